"""A quick check of the training set at the start of a run, without reading a file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from solov2.config import Config
from solov2.data.annotations import category_id_shift
from solov2.data.image_dataset import ImageDataset
from solov2.data_check.statistics import boxes_look_like_corners, unseen_by_range
from solov2.errors import printable

CORNERS = (
    "the boxes look like corners x1, y1, x2, y2, but COCO's bbox is x, y, width, height: instances are assigned to the "
    "wrong sizes; solov2 check-data --fix computes them from the masks"
)


def quick_check(dataset: ImageDataset, config: Config) -> list[str]:
    """Messages about the loaded annotations of a training set, without reading a file again; empty if all is well.

    Args:
        dataset: opened with `training=True`.
        config: of the run; its training sizes and scale ranges are used.
    """
    positions, labels, boxes = dataset.instance_table()
    messages = []
    used = {dataset.category_ids[label] for label in set(labels.tolist())} | set(dataset.unknown_categories)
    shift = category_id_shift(used, dataset.category_ids)
    if shift:
        messages.append(off_by_one_message(shift, used, dataset.category_ids))
    present = set(labels.tolist())
    missing = [name for label, name in enumerate(dataset.class_names) if label not in present]
    if missing and not shift:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        messages.append(
            f"{len(missing)} of {len(dataset.class_names)} classes have no instances and cannot be learned: "
            f"{', '.join(missing[:8])}{more}"
        )
    sizes = dataset.image_sizes()[positions]
    if boxes_look_like_corners(np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1), sizes):
        messages.append(CORNERS)
    unseen = unseen_by_range(boxes, sizes, config.model, config.data)
    if unseen.any():
        messages.append(
            f"{unseen.sum()} of {len(unseen)} instances ({unseen.mean():.1%}) have a size outside model.scale_ranges "
            "at every training size and are not learned; solov2 check-data suggests other ranges"
        )
    return [printable(message) for message in messages]


def off_by_one_message(shift: int, used: set[int], declared: Sequence[int]) -> str:
    """The message for category ids that are all off by one; `shift` is what to add to them."""
    return (
        f"category ids look off by one: {min(used)} to {max(used)} are used, but {min(declared)} to {max(declared)} "
        f"declared, so every instance is learned as the class {'before' if shift > 0 else 'after'} its own; "
        f"add {shift} to each category_id"
    )
