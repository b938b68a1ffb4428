"""A model made faster from outside: norms folded into convolutions, channels last, Winograd convolutions."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from solov2.models.head import SOLOv2Head
from solov2.models.layers import DeformConv2d
from solov2.models.winograd import WinogradConv2d, on_every_level

Model = TypeVar("Model", bound=nn.Module)


def optimize_for_inference(model: Model, *, dtype: torch.dtype = torch.float32) -> Model:
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
        use_winograd(model)
        for module in model.modules():
            if isinstance(module, WinogradConv2d):
                module.prepare()
    for part in model.children():  # not the model itself: its pixel statistics stay float32
        part.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
    return model


def use_winograd(model: nn.Module) -> None:
    """Let every convolution of a model that gains from it compute by F(4x4, 3x3), in place; parameters and names stay.

    A head convolves all its levels in one product, since the maps of the coarse ones are too small to gain alone.
    """
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if WinogradConv2d.pays_for(conv) and not isinstance(conv, WinogradConv2d):
                setattr(parent, name, WinogradConv2d.of(conv))
        if isinstance(parent, SOLOv2Head):
            parent.convolve = on_every_level


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
            if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
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
