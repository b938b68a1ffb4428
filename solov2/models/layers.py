"""Building blocks shared by the backbone, the head and the mask branch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d


class DeformConv2d(nn.Module):
    """Deformable convolution that predicts its own offsets: DCNv2 (modulated) or DCNv1, one deformable group.

    `conv_offset` predicts 3 k k values per position in three equal parts o1, o2, m: the offsets are cat(o1, o2), read
    as (dy, dx) per tap, and sigmoid(m) modulates the taps. DCNv1 has only the first 2 k k. Offsets start at zero.
    Source: Zhu et al. 2019 (arXiv 1811.11168), layout of mmcv's ModulatedDeformConv2dPack.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.modulated = stride, padding, modulated
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.register_parameter("bias", None)  # set when a batch norm is folded in
        offset_channels = (3 if modulated else 2) * kernel_size**2
        self.conv_offset = nn.Conv2d(in_channels, offset_channels, kernel_size, stride, padding)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weight uniformly within +-1 / sqrt(fan_in) and the offset branch to zero."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H', W'], in the dtype of `x` (of autocast, if enabled).

        `weight` and `bias` replace the layer's own.

        Raises:
            RuntimeError: deterministic algorithms are enabled and gradients are needed on an accelerator.
        """
        if torch.are_deterministic_algorithms_enabled() and x.device.type != "cpu" and torch.is_grad_enabled():
            # torchvision sums its gradients in arbitrary order without reporting that to torch.
            raise RuntimeError(f"deformable convolutions have no deterministic backward pass on {x.device.type}")
        weight = self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        offsets = self.conv_offset(x)  # [B, 3 k k, H', W'], DCNv1: [B, 2 k k, H', W']
        result_dtype = offsets.dtype
        # deform_conv2d has no half-precision CPU kernels, and sampling positions need more than bf16's 8 bits anyway.
        wide = torch.promote_types(result_dtype, torch.float32)
        offsets = offsets.to(wide)
        mask = None
        if self.modulated:
            first, second, mask = offsets.chunk(3, dim=1)  # [B, k k, H', W'] each
            offsets, mask = torch.cat([first, second], dim=1), mask.sigmoid()  # [B, 2 k k, H', W'], [B, k k, H', W']
        with torch.autocast(x.device.type, enabled=False):
            y = deform_conv2d(
                x.to(wide),
                offsets,
                weight.to(wide),
                None if bias is None else bias.to(wide),
                stride=self.stride,
                padding=self.padding,
                mask=mask,
            )  # [B, out_channels, H', W']
        return y.to(result_dtype)


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), keeping only the inputs for the backward pass, which calls the function again."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def make_norm(kind: str, channels: int) -> nn.Module:
    """GroupNorm with 32 groups ("group", the reference) or BatchNorm2d ("batch").

    Raises:
        ValueError: `kind` is neither "group" nor "batch".
    """
    if kind == "group":
        return nn.GroupNorm(32, channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    raise ValueError(f"norm must be 'group' or 'batch', got {kind!r}")


class SyncBatchNorm2d(nn.SyncBatchNorm, nn.BatchNorm2d):
    """A batch norm that uses the statistics of all processes in training; the rest of the code sees a BatchNorm2d."""

    process_group: Any = None  # all processes


def synchronize_batch_norms(model: nn.Module) -> int:
    """Turn the batch norms in training mode into `SyncBatchNorm2d`, in place; returns their number.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` would also convert those with fixed statistics.
    """
    trained = [module for module in model.modules() if type(module) is nn.BatchNorm2d and module.training]
    for norm in trained:
        norm.__class__ = SyncBatchNorm2d  # the same parameters and buffers, wherever they are referred to
    return len(trained)


class ConvNormReLU(nn.Sequential):
    """Bias-free convolution, norm, ReLU: a step of a tower or of the mask branch. [B, C, H, W] -> [B, C', H, W]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        norm: str = "group",
        deformable: bool = False,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        if deformable:
            self.conv: nn.Conv2d | DeformConv2d = DeformConv2d(
                in_channels, out_channels, kernel_size, padding=padding, modulated=modulated
            )
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
            nn.init.normal_(self.conv.weight, std=0.01)
        self.norm = make_norm(norm, out_channels)
        self.relu = nn.ReLU(inplace=True)

    def norm_relu(self, x: Tensor) -> Tensor:
        """Norm and ReLU of a map [B, C', H, W], in its own type, for another convolution to read.

        On an NVIDIA card autocast computes group norm in float32 and leaves the result so. Rounding it here instead of
        in that convolution changes no number, since ReLU and rounding commute, and halves what ReLU reads and keeps.
        """
        return self.relu(self.norm(x).to(x.dtype))
