"""Convolutions with their ReLUs and residual sums compute what the separate operations compute, in fewer passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.operations import Operations
from helpers.tiny_models import lively, tiny_model
from torch import Tensor, nn

from solov2.models import fused
from solov2.models.fused import FusedBlock, convolve_relu
from solov2.models.optimize import fold_batch_norms, fuse_activations
from solov2.models.resnet import ResNet
from solov2.models.winograd import WinogradConv2d

KINDS = {
    "basic": {"name": "resnet18"},
    "bottleneck": {"name": "resnet50"},
    "stride in the 1x1": {"name": "resnet50", "stride_in_1x1": True},
    "deformable": {"name": "resnet50", "deformable": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_backbone_equals_the_plain_one(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    backbone = ResNet(**KINDS[kind], width=16).eval().requires_grad_(False)
    fold_batch_norms(backbone)
    backbone = backbone.to(dtype=dtype, memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 96, dtype=dtype).contiguous(memory_format=torch.channels_last)
    plain = backbone(images)
    fuse_activations(backbone)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-14, torch.bfloat16: 5e-2}[dtype]
    for x, y in zip(plain, backbone(images), strict=True):
        assert (x - y).abs().max() <= tolerance * x.abs().max()


def test_no_pass_for_relu_or_sum_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except behind Winograd convolutions, which have no such form."""
    monkeypatch.setattr(WinogradConv2d, "is_suitable", lambda conv: False)
    model = lively(tiny_model())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), Operations() as plain:
        model.eval().backbone(images)
    backbone = model.optimize().backbone
    with torch.no_grad(), Operations() as fast:
        backbone(images)
    assert {"relu_", "add_"} <= set(plain.names)
    assert not {"relu_", "clamp_min_", "add_", "add"} & set(fast.names)


class CuDNN:
    """Stands in for the two operations of torch that need an NVIDIA card."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def relu(self, x: Tensor, weight: Tensor, bias: Tensor, **geometry: Any) -> Tensor:
        self.calls.append("relu")
        return F.relu(F.conv2d(x, weight, bias, **geometry))

    def add_relu(self, x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, **geometry: Any) -> Tensor:
        self.calls.append("add_relu")
        return F.relu(F.conv2d(x, weight, bias, **geometry) + alpha * z)


def test_an_nvidia_card_fuses_the_same_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone = ResNet("resnet50", width=16).eval().requires_grad_(False)
    fold_batch_norms(backbone)
    images = torch.randn(1, 3, 64, 64)
    plain = backbone(images)
    fuse_activations(backbone)
    library = CuDNN()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(fused, "has_cudnn", lambda x: True)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", library.relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", library.add_relu)
    for x, y in zip(plain, backbone(images), strict=True):
        assert (x - y).abs().max() <= 1e-5 * x.abs().max()
    assert library.calls.count("add_relu") == 16 and library.calls.count("relu") == 1 + 2 * 16


def test_the_shortcut_of_a_stage_is_not_overwritten() -> None:
    """The last convolution adds in place, which must never reach what the pyramid reads."""
    torch.manual_seed(0)
    backbone = ResNet("resnet18", width=16).eval().requires_grad_(False)
    fold_batch_norms(backbone)
    fuse_activations(backbone)
    features = backbone(torch.randn(1, 3, 64, 64))
    before = [x.clone() for x in features]
    backbone.layer4(features[2])
    assert all(torch.equal(x, y) for x, y in zip(before, features))
    assert isinstance(backbone.layer1[0], FusedBlock)


def test_autocast_and_compilation_use_the_separate_operations() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 8, 12, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolve_relu(conv, x).dtype == torch.bfloat16
    assert torch.export.export(_Wrapped(conv), (x,)) is not None


class _Wrapped(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """As the real one."""
        return convolve_relu(self.conv, x)
