"""Networks that are small enough for a test, one for each way in which the published ones differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from solov2.build import build_model
from solov2.checkpoint import FORMAT, Checkpoint, load_file, write_file
from solov2.models.solov2 import SOLOv2

TINY = {
    "backbone_width": 8,
    "fpn_channels": 32,
    "tower_channels": 32,
    "tower_depth": 2,
    "mask_hidden_channels": 32,
    "mask_feature_channels": 32,
    "num_classes": 3,
    "grid_sizes": (8, 6, 5, 4, 3),
}
VARIANTS = {
    "basic blocks": ("solov2_light_r18_fpn_3x", {}),
    "bottlenecks": ("solov2_r50_fpn_1x", {}),
    "deformable everywhere": (
        "solov2_r50_fpn_1x",
        {"deformable_stages": True, "deformable_tower_convs": 2, "deformable_mask_branch": True},
    ),
    "DCNv1": ("solov2_light_r50_dcn_fpn_3x", {"modulated": False}),
    "nothing frozen, batch norm": ("quickstart", {"num_classes": 3}),
    "batch norms frozen alone": ("solov2_light_r18_fpn_3x", {"frozen_stages": 0}),
    "three stages frozen": ("solov2_light_r18_fpn_3x", {"frozen_stages": 3}),
}


def tiny_model(variant: str = "basic blocks", **changes: Any) -> SOLOv2:
    """One of `VARIANTS` with random weights, always the same; `changes` are further fields of its configuration."""
    name, own = VARIANTS[variant]
    torch.manual_seed(0)
    return build_model(name, **(TINY if name != "quickstart" else {}), **own, **changes)


def lively(model: SOLOv2) -> SOLOv2:
    """Larger predictor weights, so that a random network finds something."""
    with torch.no_grad():
        for part in (model.head.category_predictor, model.head.kernel_predictor):
            part.weight.mul_(30)
        model.head.category_predictor.bias.fill_(-2.0)
    return model


def save_content(path: Path, content: dict[str, Any]) -> None:
    """A file of our own format with these entries and no others, right or wrong."""
    write_file(path, {"format": FORMAT, **content})


def numbered(number: int) -> Checkpoint:
    """A checkpoint that can be told from others, see `number_of`."""
    return Checkpoint("a test", {"number": torch.tensor(number)})


def number_of(path: Path) -> int:
    """The number of a saved `numbered` checkpoint."""
    return int(load_file(path)["model"]["number"])
