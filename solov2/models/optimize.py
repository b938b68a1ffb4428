"""The prepared form of a model for inference: norms folded into convolutions, a fast layout, fewer multiplications."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from solov2.models.layers import DeformConv2d

TILE = 4  # outputs per tile and axis
WINDOW = TILE + 2  # inputs per tile and axis
# Points at which the polynomials of the transform are evaluated; these keep its rounding errors small.
POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2), math.inf)
LEAST_CHANNELS = 64  # below, the transforms cost more than the multiplications they save
LEAST_TILES = 12  # with fewer, reading the transformed weights does
VALUES_AT_ONCE = 2**21  # of the transformed input: they stay in the processor's cache


def optimize_for_inference(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of a SOLOv2 that computes the same function faster and can no longer be trained.

    Batch norms with fixed statistics go into the convolutions before them, memory is laid out channels last, and on a
    CPU in float32 the 3x3 convolutions with stride 1 become `WinogradConv2d`.

    Args:
        model: in evaluation mode or not; it is left as it is.
        dtype: float32, or bfloat16 for processors that multiply it faster.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norms(model)
    device = next(model.parameters()).device
    if device.type == "cpu" and dtype == torch.float32:
        _replace_convolutions(model)
    for part in model.children():  # not the model itself: its pixel statistics stay float32
        part.to(dtype=dtype, memory_format=torch.channels_last)
    return model


def fold_batch_norms(model: nn.Module) -> None:
    """Put every batch norm that follows a convolution into its weight and bias, in place; evaluation mode only.

    Pairs are found by the names of this package: convN and bnN of a residual block, conv and norm of a
    `ConvNormReLU`, and the two modules of a shortcut.
    """
    for parent in list(model.modules()):
        names = dict(parent.named_children())
        pairs = [(name, name.replace("conv", "bn")) for name in names if name.startswith("conv") and name != "conv"]
        pairs += [("conv", "norm"), ("0", "1")]
        for conv_name, norm_name in pairs:
            conv, norm = names.get(conv_name), names.get(norm_name)
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            if isinstance(conv, nn.Conv2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
            elif isinstance(conv, DeformConv2d):
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
            else:
                continue
            setattr(parent, norm_name, nn.Identity())


def _replace_convolutions(model: nn.Module) -> None:
    for parent in list(model.modules()):
        if isinstance(parent, WinogradConv2d):
            continue
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and WinogradConv2d.pays_for(conv):
                setattr(parent, name, WinogradConv2d(conv))


class WinogradConv2d(nn.Module):
    """A 3x3 convolution (stride 1, padding 1) by Winograd's minimal filtering F(4x4, 3x3), for CPUs.

    Every 6x6 window is transformed, multiplied with the transformed weights and transformed back into 4x4 outputs: 36
    multiplications where the plain convolution takes 144. Source: Lavin and Gray 2016 (arXiv 1509.09308). Rounding in
    float32 is about four times that of the plain convolution.

    Args:
        conv: the convolution to replace; it is kept for maps too small to gain.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        to_input, to_weight, to_output = transforms()
        weight = conv.weight.detach().double().cpu().numpy()  # [O, C, 3, 3]
        weight = np.einsum("ij,ocjk,lk->ilco", to_weight, weight, to_weight).reshape(WINDOW**2, *weight.shape[1::-1])
        like = {"dtype": conv.weight.dtype, "device": conv.weight.device}
        self.register_buffer("weight", torch.tensor(weight, **like).contiguous(), persistent=False)
        for name, matrix in (("to_input", to_input), ("to_output", to_output)):
            self.register_buffer(name, torch.tensor(np.kron(matrix, matrix), **like), persistent=False)

    @staticmethod
    def pays_for(conv: nn.Conv2d) -> bool:
        """Whether the convolution is of this kind and wide enough."""
        kind = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        wide = min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        return kind == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and wide

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H, W], channels last."""
        batch, channels, height, width = x.shape
        rows, columns = -(-height // TILE), -(-width // TILE)
        if batch * rows * columns < LEAST_TILES:
            return self.conv(x)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, TILE * columns - width + 1, 1, TILE * rows - height + 1))
        y = x.new_empty(batch, rows, TILE, columns, TILE, self.weight.shape[2])
        at_once = max(1, VALUES_AT_ONCE // (WINDOW**2 * batch * columns * channels))
        for start in range(0, rows, at_once):
            stop = min(start + at_once, rows)
            windows = x[:, TILE * start : TILE * stop + 2].unfold(1, WINDOW, TILE).unfold(2, WINDOW, TILE)
            windows = windows.permute(4, 5, 0, 1, 2, 3).reshape(WINDOW**2, -1)  # [36, B tiles C]
            products = torch.bmm((self.to_input @ windows).view(WINDOW**2, -1, channels), self.weight)
            tiles = (self.to_output @ products.view(WINDOW**2, -1)).view(TILE, TILE, batch, stop - start, columns, -1)
            tiles = tiles.permute(2, 3, 0, 4, 1, 5)
            if self.conv.bias is None:
                y[:, start:stop] = tiles
            else:
                torch.add(tiles, self.conv.bias, out=y[:, start:stop])
        return y.view(batch, TILE * rows, TILE * columns, -1)[:, :height, :width].permute(0, 3, 1, 2)


def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices of the one-dimensional F(4, 3), float64: input [6, 6], weight [6, 3], output [4, 6].

    A product of polynomials of degree 2 and 3 is known from its values at six points; the filter is that product's
    transpose (Toom and Cook). Rows are scaled so that weights and inputs are transformed with similar magnitudes.
    """
    three, four, six = (_powers(count) for count in (3, 4, 6))
    to_input = np.linalg.inv(six).T
    scale = np.abs(to_input).max(1, keepdims=True)
    return to_input / scale, three * scale, four.T


def _powers(count: int) -> np.ndarray:
    """Powers 0 .. count - 1 of every point [6, count]; at infinity only the highest counts."""
    rows = [[0.0] * (count - 1) + [1.0] if math.isinf(p) else [p**k for k in range(count)] for p in POINTS]
    return np.array(rows)
