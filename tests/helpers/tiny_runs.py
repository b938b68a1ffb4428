"""A training run that takes seconds: the quickstart configuration at 64 pixels on a handful of shapes."""

from __future__ import annotations

from pathlib import Path

import torch

from solov2.build import build_assigner
from solov2.config import Config, TrainConfig, load_config
from solov2.training.plan import Plan

SETTINGS = (
    "data.shapes_train=16", "data.shapes_val=6", "data.shapes_size=64", "data.train_scales=[64]",
    "data.train_long_edge=64", "data.workers=1", "model.input_scale=[64, 64]", "model.grid_sizes=[8, 6, 5, 4, 2]",
    "model.scale_ranges=[[1, 14], [10, 24], [18, 36], [30, 60], [50, 100]]", "model.backbone_width=16",
    "model.fpn_channels=32", "model.tower_channels=32", "model.mask_hidden_channels=32",
    "model.mask_feature_channels=32",
    "train.batch_size=4", "train.log_every=1", "train.warmup_steps=2",
)  # fmt: skip


def tiny_config(*changes: str) -> Config:
    """The tiny configuration, with `changes` applied."""
    return load_config("quickstart", [*SETTINGS, *changes])


def arguments(root: Path, output: Path, *more: str) -> list[str]:
    """The tiny run's command line for train.py; the dataset at `root` is generated on first use."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["quickstart", *settings, "--data-root", str(root), "--output", str(output), "--device", "cpu", *more]


def random_batch(
    config: Config, *, seed: int, images: int = 2, instances: int = 3, size: int | tuple[int, int] = 64
) -> dict:
    """A batch of noise images with targets, rectangles of 8 to 23 pixels; `instances` 0 gives empty images.

    `size` is the side of the images, or their (height, width).
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size
    truths = []
    for _ in range(images):
        start = torch.randint(0, height - 24, (instances, 2), generator=generator)  # y, x
        start[:, 1] = start[:, 1] * (width - 24) // (height - 24)
        extent = torch.randint(8, 24, (instances, 2), generator=generator)
        masks = torch.zeros(instances, height, width, dtype=torch.uint8)
        for mask, (y, x), (h, w) in zip(masks, start.tolist(), extent.tolist()):
            mask[y : y + h, x : x + w] = 1
        boxes = torch.cat([start.flip(1), (start + extent).flip(1)], dim=1).float()
        labels = torch.randint(0, config.model.num_classes, (instances,), generator=generator)
        truths.append({"boxes": boxes, "labels": labels, "masks": masks})
    sizes = torch.tensor([[height, width]] * images)
    return {
        "pixels": torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, generator=generator),
        "sizes": sizes, "original_sizes": sizes.clone(), "image_ids": list(range(images)),
        "targets": build_assigner(config.model)(truths, (height, width)),
    }  # fmt: skip


def flat_plan(steps: int, rate: float, *, log_every: int = 1, **train: float) -> Plan:
    """One epoch of `steps` at a constant learning rate; `train` are more fields of the recipe, such as accumulate."""
    images = int(train.get("accumulate", 1))
    recipe = TrainConfig(
        epochs=1, batch_size=1, reference_batch_size=images, learning_rate=rate, warmup_steps=0, step_epochs=(),
        log_every=log_every, **{"clip_norm": 0.0, **train},
    )  # fmt: skip
    return Plan(recipe, processes=1, steps_per_epoch=steps)
