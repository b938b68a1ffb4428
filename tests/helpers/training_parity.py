"""The reference's targets, training steps and learning rates, and functions that compute ours for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helpers.parity import FORWARD, GRIDS, decode, instances, load, network_input, reference_model
from solov2.losses import SOLOv2Criterion
from solov2.models.solov2 import SOLOv2
from solov2.targets import TargetAssigner
from solov2.training.optim import build_optimizer, learning_rate_factor

TARGETS = load("targets.json.gz")
SCENES = {scene["name"]: scene for scene in TARGETS["scenes"]}
TRAJECTORIES = load("trajectories.json.gz")
SCHEDULES = {stored["name"]: stored for stored in load("schedule.json")["schedules"]}

# ---- targets

FIRST_CELL = [sum(size * size for size in GRIDS[:level]) for level in range(len(GRIDS))]


def scene_assigner(ranges: str) -> TargetAssigner:
    """The assigner of a stored set of scale ranges."""
    return TargetAssigner(GRIDS, TARGETS["scale_ranges"][ranges], num_classes=80, center_sigma=TARGETS["pos_scale"])


def expected_category(expected: dict[str, Any]) -> Tensor:
    """Classes of all cells, int64 [cells]; 80 is background."""
    category = torch.full((sum(size * size for size in GRIDS),), 80)
    for first, labels in zip(FIRST_CELL, expected["labels"]):
        for cell, label in labels:
            category[first + cell] = label
    return category


def expected_positives(expected: dict[str, Any]) -> list[list[int]]:
    """(image, cell, instance) triples: the stored rectangles level by level, each row by row."""
    return [
        [0, first + y * size + x, instance]
        for first, size, rectangles in zip(FIRST_CELL, GRIDS, expected["cells"])
        for instance, top, bottom, left, right in rectangles
        for y in range(top, bottom + 1)
        for x in range(left, right + 1)
    ]


def assert_targets(scene: dict[str, Any], ranges: str) -> None:
    """Check that cells, categories and masks of a scene equal the stored ones."""
    expected = scene["expected"][ranges]
    truth, padded = instances(scene), tuple(scene["pad_shape"])
    targets = scene_assigner(ranges)([truth], padded)
    assert torch.equal(targets["category"], expected_category(expected)[None])
    assert targets["positives"].tolist() == expected_positives(expected)
    assert targets["positives_per_image"] == [expected["num_entries"]]
    assert targets["instances_per_image"] == [len(truth["labels"])]
    assert (targets["category"] < 80).sum() == expected["num_pos"]
    quarter = [side // 4 for side in padded]
    assert targets["masks"].shape == (len(truth["labels"]), *quarter)
    for mask, counts in zip(targets["masks"], scene["mask_targets"], strict=True):
        if counts is not None:
            assert torch.equal(mask, decode(counts, quarter))


# ---- training steps


def start_of_trajectory(stored: dict[str, Any], dtype: torch.dtype) -> SOLOv2:
    """The network before the first step, in training mode."""
    config = stored["config"]
    return reference_model(config, FORWARD[config]["overrides"]).to(dtype).train()


def trajectory_losses(model: SOLOv2, stored: dict[str, Any]) -> dict[str, Tensor]:
    """Losses of the stored batch."""
    images = network_input(**stored["input"]).to(next(model.parameters()).dtype)
    assign = TargetAssigner(GRIDS, stored["scale_ranges"], num_classes=80)
    targets = assign([instances(image) for image in stored["images"]], tuple(images.shape[-2:]))
    return SOLOv2Criterion(num_classes=80)(model(images), targets)


def trajectory_steps(
    model: SOLOv2, stored: dict[str, Any]
) -> Iterator[tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]]:
    """Yield (losses, gradient norm before clipping, gradients before clipping) step by step."""
    recipe = stored["optimizer"]
    assert recipe["type"] == "SGD"
    optimizer = build_optimizer(
        model,
        name="sgd",
        learning_rate=recipe["lr"],
        momentum=recipe["momentum"],
        weight_decay=recipe["weight_decay"],
        decay_norms=True,
    )
    while True:
        optimizer.zero_grad()
        losses = trajectory_losses(model, stored)
        sum(losses.values()).backward()
        gradients = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"])
        optimizer.step()
        yield losses, norm, gradients


# ---- learning rates


def stored_schedule(stored: dict[str, Any]) -> Callable[[int], float]:
    """Our schedule with the stored settings: step -> factor of the learning rate."""
    return partial(
        learning_rate_factor,
        kind="step",
        steps_per_epoch=stored["iters_per_epoch"],
        epochs=stored["epochs"],
        warmup_steps=stored["warmup_iters"],
        warmup_start=stored["warmup_start_factor"],
        step_epochs=stored["milestones"],
    )
