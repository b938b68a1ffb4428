"""Networks small enough for tests, one for each way in which the published ones differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from solov2.build import build_model
from solov2.checkpoint import FORMAT, Checkpoint, load_file, write_file
from solov2.config import load_config
from solov2.models.solov2 import SOLOv2
from solov2.targets import TargetAssigner

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
    """One of `VARIANTS` with fixed random weights; `changes` override more fields of its configuration."""
    name, own = VARIANTS[variant]
    torch.manual_seed(0)
    return build_model(name, **(TINY if name != "quickstart" else {}), **own, **changes)


def lively(model: SOLOv2) -> SOLOv2:
    """Enlarge the predictor weights, so that a random network finds something."""
    with torch.no_grad():
        for part in (model.head.category_predictor, model.head.kernel_predictor):
            part.weight.mul_(30)
        model.head.category_predictor.bias.fill_(-2.0)
    return model


def save_finder(path: Path, *, max_instances: int) -> Path:
    """Write a small untrained network that finds something everywhere, on inputs of 64 pixels."""
    config = load_config("quickstart", {"input_scale": [64, 64], "max_instances": max_instances})
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.init.zeros_(model.head.category_predictor.bias)
    for predictor in (model.head.category_predictor, model.head.kernel_predictor):
        torch.nn.init.normal_(predictor.weight, std=6.0)
    names = ["disc", "ring", "square", "star"]
    save_content(path, {"model": model.state_dict(), "config": config.to_dict(), "class_names": names, "traits": {}})
    return path


def tiny_targets(model: SOLOv2, counts: Sequence[int], size: tuple[int, int]) -> dict[str, Any]:
    """Targets of images of `size` (height, width) with `counts` rectangles, for a model of `TINY`."""
    generator, truths = torch.Generator().manual_seed(3), []
    for count in counts:
        boxes, masks = torch.zeros(count, 4), torch.zeros(count, *size, dtype=torch.uint8)
        for box, mask in zip(boxes, masks):
            width, height = (int(torch.randint(10, 40, (1,), generator=generator)) for _ in range(2))
            left, top = (int(torch.randint(0, side - 40, (1,), generator=generator)) for side in size[::-1])
            mask[top : top + height, left : left + width] = 1
            box[:] = torch.tensor([left, top, left + width, top + height])
        truths.append({"boxes": boxes, "labels": torch.randint(0, 3, (count,), generator=generator), "masks": masks})
    ranges = [(1, 24), (12, 48), (24, 96), (48, 192), (96, 384)]
    return TargetAssigner(model.grid_sizes, ranges, num_classes=3)(truths, size)


def save_content(path: Path, content: dict[str, Any]) -> None:
    """Write a file in our own format with exactly these entries, valid or not."""
    write_file(path, {"format": FORMAT, **content})


def numbered(number: int) -> Checkpoint:
    """A checkpoint identified by a number, see `number_of`."""
    return Checkpoint("a test", {"number": torch.tensor(number)})


def number_of(path: Path) -> int:
    """The number of a saved `numbered` checkpoint."""
    return int(load_file(path)["model"]["number"])
