"""Propose settings for a dataset: schedule, sizes and limits, each with its reason.

Only settings that depend on the data are proposed. The learning rate stays, since it is scaled to the batch anyway.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from solov2.config import Config, changed_settings, override_config
from solov2.data.loader import TrainBatchSampler
from solov2.data_check.findings import Instances
from solov2.data_check.statistics import (
    CROWDED,
    SMALL,
    SMALL_QUANTILE,
    crowded_share,
    suggest,
    suggest_grids,
    suggest_limits,
)
from solov2.errors import count
from solov2.published import PUBLISHED_WEIGHTS

FINE_TUNING_STEPS = 3000  # optimizer steps from weights of a whole model
BACKBONE_STEPS = 6000  # from those of a backbone, or none
MIN_EPOCHS, MAX_EPOCHS = 12, 300
MAX_WARMUP, WARMUP_SHARE = 500, 0.1
EVALUATIONS = 15


class Change(NamedTuple):
    """A proposed value of a setting, "section.key", and why."""

    setting: str
    value: Any
    reason: str


@dataclass(frozen=True)
class DataFacts:
    """What a proposal depends on.

    Attributes:
        aspect_ratios: width / height of the training images with an instance.
        instances: of the training images, at the largest training size; centers are those of their boxes.
        positions: int64 [N], the index of the image of each instance.
        crowded: maximum number of instances in an image, of training and validation.
    """

    aspect_ratios: list[float]
    instances: Instances
    positions: np.ndarray
    crowded: int

    @property
    def images(self) -> int:
        """Number of training images with an instance."""
        return len(self.aspect_ratios)


def data_facts(contents: Mapping[str, Mapping[str, Any]], config: Config) -> DataFacts:
    """Read from annotations alone, without an image.

    Args:
        contents: {"train", "val"}: COCO's JSON, checked.
        config: its largest training size counts.
    """
    content, all_count = contents["train"], config.data.crowd == "instance"
    entries = {entry["id"]: (entry["height"], entry["width"]) for entry in content["images"]}
    chosen = [entry for entry in content["annotations"] if all_count or not entry.get("iscrowd")]
    sizes = np.array([entries[entry["image_id"]] for entry in chosen], dtype=np.float64).reshape(-1, 2)
    boxes = np.array([entry["bbox"] for entry in chosen], dtype=np.float64).reshape(-1, 4)
    factors = np.minimum(config.data.train_long_edge / sizes.max(1), max(config.data.train_scales) / sizes.min(1))
    scales = np.maximum(np.sqrt(boxes[:, 2] * boxes[:, 3]) * factors, 1e-3)
    padded = 32 * np.ceil(sizes * factors[:, None] / 32)
    centers = np.clip((boxes[:, 1::-1] + boxes[:, :1:-1] / 2) * factors[:, None] / padded, 0, 1)
    _, first, positions = np.unique([entry["image_id"] for entry in chosen], return_index=True, return_inverse=True)
    aspect_ratios = (sizes[first, 1] / sizes[first, 0]).tolist()
    none = np.zeros(len(chosen), dtype=np.int64)
    instances = Instances(sizes.astype(np.int64), none, none, scales, centers, none, none)
    return DataFacts(aspect_ratios, instances, positions, max(map(_most_instances, contents.values())))


def _most_instances(content: Mapping[str, Any]) -> int:
    image_ids = [entry["image_id"] for entry in content["annotations"]]
    return int(np.unique(image_ids, return_counts=True)[1].max(initial=0))


def propose(
    recipe: Config, config: Config, facts: DataFacts, *, chosen: Collection[str], weights: bool, processes: int
) -> tuple[Config, list[Change]]:
    """The configuration with settings that suit the data, and each change with its reason.

    Args:
        recipe: the configuration before the user's settings.
        config: with them.
        facts: of the data.
        chosen: settings that the user named, with or without their section; they stay.
        weights: whether the run starts from the weights of a whole model.
        processes: number of processes that train together.
    """
    kept = {name.rpartition(".")[2] for name in chosen}
    changes: list[Change] = []

    def take(found: list[Change]) -> Config:
        wanted = {change.setting: change for change in found if change.setting.partition(".")[2] not in kept}
        proposed = override_config(config, {name: change.value for name, change in wanted.items()})
        differs = {line.split()[0] for line in changed_settings(config.to_dict(), proposed.to_dict())}
        changes.extend(change for name, change in wanted.items() if name in differs)
        return proposed

    config = take(_sizes(config, facts))
    config = take(_limits(config, facts))
    config = take(_batch(config, facts, processes))
    config = take(_epochs(config, facts, weights, processes))
    return take(_schedule(recipe, config, facts, processes)), changes


def _sizes(config: Config, facts: DataFacts) -> list[Change]:
    """Input size, scale ranges and grids; none where those of the recipe do, as they are what its weights know."""
    instances, model, suggestion = facts.instances, config.model, suggest(facts.instances, facts.positions, config)
    if suggestion is None:
        return []
    small = float(np.quantile(instances.scales, SMALL_QUANTILE))
    if not SMALL / 2 <= small <= 4 * SMALL:
        reason = f"a tenth of the instances is below {small:.0f} px at the recipe's size; {SMALL} px suit the network"
        values = {
            f"{section}.{key}": value for section, entries in suggestion.items() for key, value in entries.items()
        }
        sizes = ("model.input_scale", "data.train_scales", "data.train_long_edge")
        changes = [Change(name, values[name], reason) for name in sizes]
        changes.append(Change("model.scale_ranges", values["model.scale_ranges"], "the sizes of the instances"))
        return [*changes, Change("model.grid_sizes", values["model.grid_sizes"], "cells for these sizes")]
    ranges = model.scale_ranges
    crowded = crowded_share(instances.scales, instances.centers, facts.positions, model.grid_sizes, ranges)
    if crowded <= 2 * CROWDED:
        return []
    borders = [(high * low) ** 0.5 for (_, high), (low, _) in zip(ranges, ranges[1:])]
    short = max(config.data.train_scales)
    grids = suggest_grids(instances.scales, instances.centers, facts.positions, short, borders, ranges)
    return [Change("model.grid_sizes", grids, f"{crowded:.0%} of the instances share their cells with others")]


def _limits(config: Config, facts: DataFacts) -> list[Change]:
    limits = suggest_limits(facts.crowded, config)
    reason = f"up to {facts.crowded:,} instances in an image"
    return [
        Change(f"{section}.{key}", value, reason)
        for section, entries in limits.items()
        for key, value in entries.items()
    ]


def _batch(config: Config, facts: DataFacts, processes: int) -> list[Change]:
    batch = max(1, min(config.train.batch_size, facts.images // processes))
    return [Change("train.batch_size", batch, f"{count(facts.images, 'training image')}")]


def _steps_per_epoch(config: Config, facts: DataFacts, processes: int) -> int:
    sampler = TrainBatchSampler(
        facts.aspect_ratios,
        batch_size=config.train.batch_size,
        rank=0,
        world_size=processes,
        seed=0,
        aspect_groups=config.data.aspect_groups,
    )
    return max(1, len(sampler) // config.train.accumulate)


def _epochs(config: Config, facts: DataFacts, weights: bool, processes: int) -> list[Change]:
    steps = _steps_per_epoch(config, facts, processes)
    wanted = FINE_TUNING_STEPS if weights else BACKBONE_STEPS
    epochs = min(MAX_EPOCHS, max(min(MIN_EPOCHS, config.train.epochs), math.ceil(wanted / steps)))
    start = "trained weights" if weights else "a backbone alone" if _has_backbone(config) else "random weights"
    reason = f"of {count(steps, 'step')}: about {wanted:,} from {start}, in {MIN_EPOCHS} to {MAX_EPOCHS} epochs"
    return [Change("train.epochs", epochs, reason)]


def _has_backbone(config: Config) -> bool:
    return config.train.pretrained_backbone != "none"


def _schedule(recipe: Config, config: Config, facts: DataFacts, processes: int) -> list[Change]:
    """What follows from the number of epochs, proposed or not."""
    train, epochs = config.train, config.train.epochs
    total = epochs * _steps_per_epoch(config, facts, processes)
    warmup = min(train.warmup_steps, MAX_WARMUP, int(WARMUP_SHARE * total))
    changes = [Change("train.warmup_steps", warmup, f"at most a tenth of {count(total, 'step')}, and {MAX_WARMUP}")]
    if train.schedule == "step":
        decays = sorted({max(1, round(epoch * epochs / recipe.train.epochs)) for epoch in train.step_epochs})
        changes.append(Change("train.step_epochs", decays, "the same fractions of the run as in the recipe"))
    if train.evaluate_every:
        every = max(1, round(epochs / EVALUATIONS))
        changes.append(Change("train.evaluate_every", every, f"about {min(epochs, EVALUATIONS)} evaluations"))
    every = max(1, round(epochs / EVALUATIONS))
    return [*changes, Change("train.checkpoint_every", every, "as often as evaluations")]


def proposal_lines(
    config: Config, changes: Sequence[Change], *, weights: str | None, classes: Sequence[str], processes: int
) -> list[str]:
    """The proposal for people: the classes, what the run starts from, a table of the changes, the learning rate.

    Args:
        config: with the changes.
        changes: of `propose`.
        weights: what the run starts from, if a file is named.
        classes: their names.
        processes: number of processes that train together.
    """
    train = config.train
    images = train.batch_size * processes * train.accumulate
    start = f"{train.pretrained_backbone} backbone" if _has_backbone(config) else "random weights"
    if weights is not None:
        start = weights
    elif config.name in PUBLISHED_WEIGHTS:
        start += "; starting from --weights official (a download) or a file gives better results sooner"
    rows = [(change.setting, str(_plain(change.value)), change.reason) for change in changes]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [
        f"{count(len(classes), 'class', 'classes')}: {', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}",
        f"start: {start}",
        *(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for name, value, reason in rows),
        f"  learning rate {train.learning_rate:g} for {count(train.reference_batch_size, 'image')} per step, scaled to "
        f"{images}: {train.learning_rate * images / train.reference_batch_size:g}",
    ]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
