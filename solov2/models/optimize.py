"""Faster forms of a model: norms, ReLUs and sums folded into convolutions, channels-last memory, Winograd."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from solov2.models.fused import FusedBlock, FusedConvReLU
from solov2.models.head import SOLOv2Head
from solov2.models.layers import DeformConv2d
from solov2.models.resnet import ResNet
from solov2.models.winograd import WinogradConv2d, convolve_levels_jointly

Model = TypeVar("Model", bound=nn.Module)


def optimize_for_inference(model: Model, *, dtype: torch.dtype = torch.float32) -> Model:
    """A copy of a SOLOv2 that computes the same function faster and can no longer be trained.

    Batch norms are folded into the convolutions before them, which also apply the ReLUs and sums of the backbone.
    Memory is laid out channels last. On a CPU in float32, the 3x3 convolutions with stride 1 that gain from it become
    `WinogradConv2d`.

    Args:
        model: in training or evaluation mode; left unchanged.
        dtype: float32, or bfloat16 for devices that are faster with it.
    """
    model = inference_copy(model)
    fold_batch_norms(model)
    fuse_activations(model)
    model.config = None  # type: ignore[assignment]  # its weights no longer fit the network that this describes
    device = next(model.parameters()).device
    if device.type == "cpu" and dtype == torch.float32:
        use_winograd(model)
        for module in model.modules():
            if isinstance(module, WinogradConv2d):
                module.prepare()
    for part in model.children():  # not the model itself: its pixel statistics stay float32
        part.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
    return model


def inference_copy(model: Model) -> Model:
    """A copy in evaluation mode, without gradients and without the head of an auxiliary loss."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.auxiliary_head = None  # type: ignore[assignment]  # the stubs of torch know no absent module
    return model


def fuse_activations(model: nn.Module) -> None:
    """Let the convolutions of every backbone apply its ReLUs and sums, in place; its norms must be folded."""
    for backbone in model.modules():
        if not isinstance(backbone, ResNet):
            continue
        backbone.conv1, backbone.relu = FusedConvReLU(backbone.conv1), nn.Identity()  # type: ignore[assignment]
        for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            for i, block in enumerate(stage):
                stage[i] = FusedBlock(block).eval()


def use_winograd(model: nn.Module) -> None:
    """Turn every convolution that gains from it into a `WinogradConv2d`, in place; parameters and their names stay.

    A head then convolves all its levels in one product, since the maps of coarse levels are too small to gain alone.
    """
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if WinogradConv2d.is_suitable(conv) and not isinstance(conv, WinogradConv2d):
                setattr(parent, name, WinogradConv2d.from_conv(conv))
        if isinstance(parent, SOLOv2Head):
            parent.convolve = convolve_levels_jointly


def fold_batch_norms(model: nn.Module) -> None:
    """Fold every batch norm into the weight and bias of the convolution before it, in place; evaluation mode only.

    Pairs are found by this package's module names: convN and bnN of a residual block, conv and norm of a
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
