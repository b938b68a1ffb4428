"""Foreign state dicts: every name of a family becomes ours, tensors stay, and what is unknown is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity import MODELS, mmdet_name, mmdet_shapes
from torch import Tensor

from solov2.build import build_model
from solov2.convert import convert_state_dict
from solov2.models.solov2 import SOLOv2

# parameters and state-dict entries of mmdetection's networks
SIZES = {
    "solov2_r50_fpn_1x": (46_592_912, 386),
    "solov2_r50_fpn_3x": (46_592_912, 386),
    "solov2_r101_fpn_3x": (65_585_040, 692),
    "solov2_r101_dcn_fpn_3x": (68_729_118, 784),
    "solov2_x101_dcn_fpn_3x": (113_420_574, 784),
    "solov2_light_r18_fpn_3x": (18_271_760, 176),
    "solov2_light_r34_fpn_3x": (28_379_920, 272),
    "solov2_light_r50_fpn_3x": (31_340_560, 374),
    "solov2_light_r50_dcn_fpn_3x": (33_516_965, 410),
}


def without_storage(name: str) -> SOLOv2:
    with torch.device("meta"):
        return build_model(name, device="meta")


def tiny_state() -> dict[str, Tensor]:
    """A small network's state dict under mmdetection's names."""
    model = build_model(
        "solov2_light_r50_dcn_fpn_3x",
        backbone_width=8,
        fpn_channels=32,
        tower_channels=32,
        mask_hidden_channels=32,
        mask_feature_channels=32,
        num_classes=3,
    )
    return {mmdet_name(name): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", SIZES)
def test_every_name_of_mmdetection_becomes_ours(name: str) -> None:
    model = without_storage(name)
    assert (sum(parameter.numel() for parameter in model.parameters()), len(model.state_dict())) == SIZES[name]
    converted, traits = convert_state_dict({mmdet_name(key): value for key, value in model.state_dict().items()})
    assert traits["family"] == "mmdet"
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("config", [*MODELS, "solov2_r101"])
def test_names_and_shapes_are_mmdetections(config: str, golden: Path) -> None:
    lines = (golden / "keys" / "mmdet" / f"{config}.txt").read_text().splitlines()
    stored = {
        name: tuple(int(side) for side in shape.strip("[]").split(",") if side.strip())
        for name, _, shape in (line.partition(" ") for line in lines)
    }
    assert mmdet_shapes(without_storage(f"{config}_fpn_3x")) == stored


def test_tensors_are_handed_on() -> None:
    state = tiny_state()
    converted, traits = convert_state_dict(state)
    assert len(converted) == len(state)
    assert converted["head.kernel_predictor.bias"] is state["mask_head.conv_kernel.bias"]
    assert converted["fpn.lateral.3.weight"] is state["neck.lateral_convs.3.conv.weight"]
    assert (
        converted["mask_feature_head.levels.2.1.norm.bias"]
        is state["mask_head.mask_feature_head.convs_all_levels.2.conv1.gn.bias"]
    )
    assert (
        converted["backbone.layer3.1.conv2.conv_offset.weight"] is state["backbone.layer3.1.conv2.conv_offset.weight"]
    )
    assert (traits["stride_in_1x1"], traits["channel_order"], traits["modulated"]) == (False, "rgb", True)
    assert traits["pixel_mean"] == [123.675, 116.28, 103.53] and traits["pixel_std"] == [58.395, 57.12, 57.375]


def test_our_own_names_pass() -> None:
    state = build_model("quickstart").state_dict()
    converted, traits = convert_state_dict(state)
    assert traits["family"] == "solov2" and list(converted) == list(state)
    assert converted is not state


def test_a_wrapped_checkpoint_loads(tmp_path: Path) -> None:
    """The file as mmdetection writes it, through build_model: the outputs are those of the weights."""
    overrides = {
        "backbone_width": 8,
        "fpn_channels": 32,
        "tower_channels": 32,
        "mask_hidden_channels": 32,
        "mask_feature_channels": 32,
        "num_classes": 3,
        "grid_sizes": (8, 6, 5, 4, 3),
    }
    model = build_model("solov2_light_r50_dcn_fpn_3x", **overrides)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path, state = tmp_path / "epoch_36.pth", {mmdet_name(key): value for key, value in model.state_dict().items()}
    torch.save({"meta": {"epoch": 36}, "state_dict": state}, path)
    loaded = build_model("solov2_light_r50_dcn_fpn_3x", weights=path, **overrides)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(model(images)["kernels"], loaded(images)["kernels"], strict=True):
            assert torch.equal(one, other) and one.std() > 0


def test_unknown_names_are_listed() -> None:
    state = tiny_state() | {"mask_head.extra.weight": torch.zeros(1), "rpn_head.conv.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match="2 names fit no rule.*mask_head.extra.weight, rpn_head.conv.bias"):
        convert_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"module.layer.weight": torch.zeros(1)}], ids=["nothing", "something else"])
def test_unknown_families_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="not those of a SOLOv2"):
        convert_state_dict(state)
