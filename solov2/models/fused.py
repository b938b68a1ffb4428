"""Convolutions of an inference network with the ReLU, and the sum of a residual block, in the same pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solov2.compute import has_cudnn


class FusedBlock(nn.Module):
    """A residual block whose norms are folded: each convolution applies its ReLU, the last one also adds the shortcut.

    Args:
        block: `BasicBlock` or `Bottleneck`; its convolutions are shared, under the same names.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, child in block.named_children():
            if name.startswith(("conv", "downsample")):
                setattr(self, name, child)

    def forward(self, x: Tensor, _folded: Any = None) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        children = dict(self.named_children())
        shortcut = children.pop("downsample", None)
        residual = x if shortcut is None else shortcut(x)  # [B, C', H / stride, W / stride]
        *first, last = children.values()
        for conv in first:
            x = convolve_relu(conv, x)
        return convolve_relu(last, x, residual)


class FusedConvReLU(nn.Module):
    """`convolve_relu` as a module, with the weight and the bias of a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    @property
    def weight(self) -> Tensor:
        """The convolution's weight [C', C, k, k]."""
        return self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        return convolve_relu(self.conv, x)


def convolve_relu(conv: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(conv(x) + residual), [B, C, H, W] -> [B, C', H', W'], without gradients; `residual` is overwritten.

    One pass where the device's library offers that: oneDNN on a CPU, cuDNN on an NVIDIA card.
    """
    if type(conv) is nn.Conv2d and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type):
        if _onednn_convolves(x):
            geometry = conv.padding, conv.stride, conv.dilation, conv.groups
            if residual is None:
                pointwise = torch.ops.mkldnn._convolution_pointwise
                return pointwise(x, conv.weight, conv.bias, *geometry, "relu", [], "")
            binary = torch.ops.mkldnn._convolution_pointwise_.binary
            return binary(residual, x, conv.weight, conv.bias, *geometry, "add", 1.0, "relu", [], "")
        if has_cudnn(x):
            named: dict[str, Any] = {
                "stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups
            }  # fmt: skip
            if residual is None:
                return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, **named)
            return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, conv.bias, **named)
    y = conv(x)
    return F.relu_(y if residual is None else y.add_(residual))


def _onednn_convolves(x: Tensor) -> bool:
    """Whether oneDNN convolves this tensor: on a CPU in float32, and in bf16 where the CPU has at least AVX-512."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
