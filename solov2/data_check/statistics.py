"""How a dataset fits a configuration: instance sizes against scale ranges and grids, and what would fit better.

Sizes are sqrt(box area) in pixels of the resized image, as in `solov2.targets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from solov2.config import Config, DataConfig, ModelConfig
from solov2.data.annotations import ImageId
from solov2.data.class_matching import distinct_names
from solov2.data_check.findings import ChecksOfImage, Instances

PERCENTILES = (1, 10, 50, 90, 99)
# The suggestion keeps the proportions of the published model: in COCO images at a short edge of 800, a tenth of the
# instances is below 24 px, and the middles of the overlaps of the published ranges lie at these quantiles.
SMALL, SMALL_QUANTILE = 24, 0.10
BORDER_QUANTILES = (0.44, 0.65, 0.83, 0.96)
PUBLISHED_BORDERS = (68, 136, 272, 543)
PUBLISHED_CELLS = (800 / 40, 800 / 36, 800 / 24, 800 / 16, 800 / 12)  # px
MIN_INSTANCES = 20  # for a suggestion
LEAVING = 0.2  # share of boxes beyond their images above which they are probably not x, y, width, height
CROWDED = 0.06  # maximum `crowded_share`; the published grids have 3 to 5 %


def _concatenate_instances(checks: Sequence[ChecksOfImage]) -> tuple[Instances, np.ndarray]:
    """The instances of all images, concatenated, and the index of each one's image, int64 [N]."""
    parts = [check.instances for check in checks]
    images = np.repeat(np.arange(len(parts)), [len(part.ids) for part in parts])
    if not parts:
        empty = np.zeros(0)
        return Instances(np.zeros((0, 2)), empty, empty, empty, np.zeros((0, 2)), empty, empty), images
    return Instances(*(np.concatenate(columns) for columns in zip(*parts))), images


def summarize(
    checks: Sequence[ChecksOfImage], image_ids: Sequence[ImageId], class_names: Sequence[str], config: Config
) -> dict[str, Any]:
    """Statistics of a checked dataset, as plain JSON types.

    Args:
        checks: one per image.
        image_ids: of the same images.
        class_names: in label order.
        config: what the images were checked against.
    """
    instances, images = _concatenate_instances(checks)
    scales, shared = instances.scales, np.array([check.shared_cells for check in checks], dtype=np.int64)
    counts = np.bincount(instances.labels.astype(np.int64), minlength=len(class_names)).tolist()
    ranges = config.model.scale_ranges
    return {
        "images": len(checks),
        "instances": len(scales),
        "size_percentiles": dict(zip(map(str, PERCENTILES), _round(np.percentile(scales, PERCENTILES))))
        if len(scales)
        else {},
        "instances_per_level": [int(((scales >= low) & (scales <= high)).sum()) for low, high in ranges],
        "unseen_instances": instances.ids[instances.cells == 0].tolist(),
        "hidden_instances": instances.ids[instances.hidden.astype(bool)].tolist(),
        "shared_cells": int(shared.sum()),
        "shared_cells_by_image": {
            str(image_ids[i]): int(shared[i]) for i in np.argsort(-shared, kind="stable") if shared[i]
        },
        "instances_by_class": dict(zip(distinct_names(class_names), counts)),
        "suggestion": suggest(instances, images, config),
    }


def suggest(instances: Instances, images: np.ndarray, config: Config) -> dict[str, Any] | None:
    """Input size, scale ranges and grids that suit these instances as the published ones suit COCO's.

    Args:
        instances: of all images, at the largest training size of `config`.
        images: int64 [N], index of the image of each instance.
        config: with the training sizes at which they were measured.

    Returns:
        {"model": {...}, "data": {...}} with keys of the configuration, or None if there are too few instances.
    """
    if len(instances.scales) < MIN_INSTANCES:
        return None
    sizes = instances.image_size.astype(np.float64)
    data = config.data
    factors = np.minimum(data.train_long_edge / sizes.max(1), max(data.train_scales) / sizes.min(1))
    relative = instances.scales / (factors * sizes.min(1))  # float64 [N], fraction of the short edge
    median_short, aspect = np.median(sizes.min(1)), np.percentile(sizes.max(1) / sizes.min(1), 95)
    ideal_short = SMALL / max(np.quantile(relative, SMALL_QUANTILE), 1e-6)
    short = _multiple_of_32(np.clip(ideal_short, min(256, 2 * median_short), min(1024, 2 * median_short)))
    if abs(short / max(data.train_scales) - 1) <= 0.25:  # too close to the current size to be worth a change
        short, long = min(max(data.train_scales), data.train_long_edge), data.train_long_edge
    else:
        long = _multiple_of_32(short * np.clip(aspect, 1, 2.5))
    scales = relative * np.minimum(short * np.ones(len(sizes)), long * sizes.min(1) / sizes.max(1))
    borders = [max(4.0, float(np.quantile(scales, quantile))) for quantile in BORDER_QUANTILES]
    for level in range(1, len(borders)):
        borders[level] = max(borders[level], 1.25 * borders[level - 1])
    low = [1, *(round(border / 2**0.5) for border in borders)]
    high = [*(round(border * 2**0.5) for border in borders), max(2048, long, round(borders[-1] * 2**0.5))]
    ranges = [list(pair) for pair in zip(low, high)]
    grids = suggest_grids(scales, instances.centers, images, short, borders, ranges)
    scaled = sorted(
        {_multiple_of_32(edge * short / max(data.train_scales)) for edge in data.train_scales}, reverse=True
    )
    limits = suggest_limits(int(np.bincount(images).max()), config)
    return {
        "model": {"grid_sizes": grids, "scale_ranges": ranges, "input_scale": [int(long), int(short)],
                  **limits.get("model", {})},
        "data": {"train_scales": scaled if short != max(data.train_scales) else list(data.train_scales),
                 "train_long_edge": int(long), **limits.get("data", {})},
    }  # fmt: skip


def suggest_limits(instances: int, config: Config) -> dict[str, dict[str, int]]:
    """Limits of detections that suit images with up to this many instances; empty if those of `config` do.

    The next hundred, and as candidates before NMS at least twice as many.
    """
    limit, model = 100 * -(-instances // 100), config.model
    if instances <= min(config.data.max_detections, model.max_instances or instances):
        return {}
    candidates = {"max_candidates": max(model.max_candidates, 2 * limit)} if model.max_candidates else {}
    return {"model": {"max_instances": limit, **candidates}, "data": {"max_detections": limit}}


def suggest_grids(
    scales: np.ndarray,
    centers: np.ndarray,
    images: np.ndarray,
    short: float,
    borders: Sequence[float],
    ranges: Sequence[Sequence[float]],
) -> list[int]:
    """Grids whose cells suit the instances as the published ones suit COCO's; finer if instances are crowded.

    Args:
        scales: float64 [N], centers: float64 [N, 2] as in `Instances`, images: int64 [N].
        short: short edge of the input.
        borders: middles of the overlaps of neighboring ranges.
        ranges: (low, high) per level.
    """
    ratios = [borders[0] / PUBLISHED_BORDERS[0], *(new / old for new, old in zip(borders, PUBLISHED_BORDERS))]
    cells = [cell * ratio for cell, ratio in zip(PUBLISHED_CELLS, ratios)]
    grids: list[int] = []
    for finer in (1, 1.25, 1.5, 2):
        grids = [int(np.clip(round(finer * short / cell), 4, max(4, short // 8))) for cell in cells]
        grids = np.minimum.accumulate(grids).tolist()
        if crowded_share(scales, centers, images, grids, ranges) <= CROWDED:
            break
    return grids


def crowded_share(
    scales: np.ndarray,
    centers: np.ndarray,
    images: np.ndarray,
    grids: Sequence[int],
    ranges: Sequence[Sequence[float]],
) -> float:
    """Share of instances whose center shares its cell with another's on every level whose range contains their size."""
    alone, covered = np.zeros(len(scales), dtype=bool), np.zeros(len(scales), dtype=bool)
    for grid, (low, high) in zip(grids, ranges):
        chosen = np.flatnonzero((scales >= low) & (scales <= high))
        row, column = (np.minimum((centers[chosen] * grid).astype(np.int64), grid - 1)).T
        _, cell, counts = np.unique(
            (images[chosen] * grid + row) * grid + column, return_inverse=True, return_counts=True
        )
        covered[chosen] = True
        alone[chosen] |= counts[cell] == 1
    return float((covered & ~alone).sum() / max(1, covered.sum()))


def unseen_by_range(boxes: np.ndarray, image_sizes: np.ndarray, model: ModelConfig, data: DataConfig) -> np.ndarray:
    """Instances whose size lies in no scale range at any training size: bool [N].

    Args:
        boxes: float64 [N, 4] xyxy in pixels of the image.
        image_sizes: int64 [N, 2], (h, w) of the image of each box.
        model: its scale ranges are used.
        data: its training sizes are used, and how far random crops and sizes change them.
    """
    limits = np.tile(image_sizes[:, ::-1], 2)
    clipped = np.clip(boxes, 0, limits)
    areas = (clipped[:, 2] - clipped[:, 0]) * (clipped[:, 3] - clipped[:, 1])
    covered = np.zeros(len(boxes), dtype=bool)
    for short in data.train_scales:
        factors = np.minimum(data.train_long_edge / image_sizes.max(1), short / image_sizes.min(1))
        scales = np.sqrt(areas) * factors
        for low, high in model.scale_ranges:
            covered |= (scales * data.zoom[1] >= low) & (scales * data.zoom[0] <= high)
    return ~covered


def boxes_look_like_corners(boxes: np.ndarray, image_sizes: np.ndarray) -> bool:
    """Whether boxes that should be x, y, width, height are probably x1, y1, x2, y2.

    All of them fit as corners, and many leave their images as sizes.

    Args:
        boxes: float64 [N, 4] in pixels of the image.
        image_sizes: [N, 2], (h, w) of the image of each box.
    """
    if not len(boxes):
        return False
    first, second, limits = boxes[:, :2], boxes[:, 2:], image_sizes[:, ::-1]
    leaves = (first + second > limits + 1).any(axis=1)
    return bool(leaves.mean() > LEAVING and ((first < second) & (second <= limits + 1)).all())


def _multiple_of_32(value: float) -> int:
    return max(32, 32 * round(float(value) / 32))


def _round(values: np.ndarray) -> list[float]:
    return [round(float(value), 1) for value in values]
