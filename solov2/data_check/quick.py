"""What an opened training set shows of itself at the start of a run."""

from __future__ import annotations

from collections.abc import Sequence

from solov2.config import Config
from solov2.data.annotations import shift_of_categories
from solov2.data.coco import CocoInstances
from solov2.data_check.statistics import unseen_by_range
from solov2.errors import printable


def quick_check(dataset: CocoInstances, config: Config) -> list[str]:
    """What an opened training set shows without another look at a file: sentences for people, none where all is well.

    Args:
        dataset: opened with `training=True`.
        config: of the run; its training sizes and scale ranges count.
    """
    positions, labels, boxes = dataset.instance_table()
    sentences = []
    used = {dataset.category_ids[label] for label in set(labels.tolist())} | set(dataset.unknown_categories)
    shift = shift_of_categories(used, dataset.category_ids)
    if shift:
        sentences.append(off_by_one(shift, used, dataset.category_ids))
    present = set(labels.tolist())
    missing = [name for label, name in enumerate(dataset.class_names) if label not in present]
    if missing and not shift:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        sentences.append(
            f"{len(missing)} of {len(dataset.class_names)} classes have no instance and cannot be learned: "
            f"{', '.join(missing[:8])}{more}"
        )
    unseen = unseen_by_range(boxes, dataset.image_sizes()[positions], config.model, config.data)
    if unseen.any():
        sentences.append(
            f"{unseen.sum()} of {len(unseen)} instances ({unseen.mean():.1%}) are of a size in no entry of "
            "model.scale_ranges at the training size and are not learned; solov2 check-data suggests others"
        )
    return [printable(sentence) for sentence in sentences]


def off_by_one(shift: int, used: set[int], declared: Sequence[int]) -> str:
    """The warning for category ids that are all `shift` away from those declared."""
    return (
        f"category ids look off by one: {min(used)} to {max(used)} are used and {min(declared)} to {max(declared)} "
        f"declared, so every instance learns the class {'before' if shift > 0 else 'after'} its own; "
        f"add {shift} to each category_id"
    )
