"""Where panoptic quality goes: wrong classes, missed segments, segments of nothing, and outlines.

Every kind states what PQ would be without it, from the counts of panoptic quality (Kirillov et al., arXiv 1801.00868):

    classification  a segment is found, with an IoU above 0.5, as another class
    missed          a segment of the ground truth that no prediction explains
    background      a predicted segment that explains nothing
    outline         the IoU of the matches is below 1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from solov2.data.annotations import ImageId
from solov2.data.panoptic_file import PanopticFile
from solov2.evaluation.panoptic import GROUPS, MIN_IOU, Counts
from solov2.ops.panoptic import count_pairs

KINDS = ("classification", "missed", "background", "outline")
VOID = 0  # category of pixels without a segment, and of crowds


class Loss(NamedTuple):
    """What a kind of error costs.

    Attributes:
        kind: one of `KINDS`.
        group: "things" or "stuff".
        gain: PQ of all classes gained without it, a fraction of 1.
        number: of the errors; of outlines, the matches.
    """

    kind: str
    group: str
    gain: float
    number: int


@dataclass
class SegmentConfusion:
    """What predictions take for what; ranks `merge` each other's.

    Attributes:
        pixels: (true category, predicted category) -> number of pixels; `VOID` for none. True void does not count.
        mistaken: (true category, predicted category) -> the IoU of each segment found as another class.
    """

    pixels: Counter[tuple[int, int]] = field(default_factory=Counter)
    mistaken: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def add(self, truth: PanopticFile, image_id: ImageId, found_map: np.ndarray, found: Mapping[int, int]) -> None:
        """Add an image: the predicted map int32 [H, W] and {id: category id}."""
        known = {x.id: x.category_id for x in truth[image_id].segments if not x.is_crowd}
        pairs = count_pairs(truth.read_map(image_id), found_map)
        areas = [Counter[int](), Counter[int]()]  # of the ground truth, of the predictions
        for pair, pixels in pairs.items():
            for area, number in zip(areas, pair):
                area[number] += pixels
        for (number, found_number), pixels in pairs.items():
            if number not in known:
                continue
            true, predicted = known[number], found.get(found_number, VOID)
            self.pixels[true, predicted] += pixels
            union = areas[0][number] + areas[1][found_number] - pixels - pairs.get((0, found_number), 0)
            if predicted not in (VOID, true) and pixels / union > MIN_IOU:
                self.mistaken.setdefault((true, predicted), []).append(pixels / union)

    def merge(self, others: Sequence[SegmentConfusion]) -> None:
        """Add what other ranks counted."""
        for other in others:
            self.pixels.update(other.pixels)
            for pair, ious in other.mistaken.items():
                self.mistaken.setdefault(pair, []).extend(ious)


@dataclass(frozen=True)
class PanopticErrors:
    """The errors of a set of results.

    Attributes:
        quality: PQ of all classes, a fraction of 1; None without ground truth.
        losses: by kind and group, the largest first.
        confusion: of pixels and segments.
        stuff, things: their category ids.
        numbers: category id -> number of segments of the ground truth.
    """

    quality: float | None
    losses: list[Loss]
    confusion: SegmentConfusion
    stuff: list[int]
    things: list[int]
    numbers: dict[int, int]


def find_losses(
    counts: Mapping[int, Counts], is_thing: Mapping[int, bool], confusion: SegmentConfusion
) -> PanopticErrors:
    """What each kind of error costs.

    Args:
        counts: category id -> its counts over all images.
        is_thing: of each category.
        confusion: of the same results.
    """
    quality = _quality(counts)
    losses = []
    for group in ("things", "stuff"):
        chosen = {category for category, thing in is_thing.items() if thing in GROUPS[group]}
        for kind in KINDS:
            better, number = _without(kind, counts, chosen, confusion.mistaken)
            if number and quality is not None:
                losses.append(Loss(kind, group, (_quality(better) or 0.0) - quality, number))
    losses.sort(key=lambda loss: -loss.gain)
    stuff, things = ([category for category in counts if is_thing[category] is kind] for kind in (False, True))
    numbers = {category: own.tp + own.fn for category, own in counts.items()}
    return PanopticErrors(quality, losses, confusion, stuff, things, numbers)


def _without(
    kind: str,
    counts: Mapping[int, Counts],
    chosen: set[int],
    mistaken: Mapping[tuple[int, int], Sequence[float]],
) -> tuple[dict[int, Counts], int]:
    """(the counts if a kind of error did not occur with the chosen categories, the number of these errors)."""
    better, number = dict(counts), 0
    wrong = {pair: ious for pair, ious in mistaken.items() if pair[0] in chosen}
    if kind == "classification":
        for (true, predicted), ious in wrong.items():
            number += len(ious)
            better[true] += Counts(sum(ious), tp=len(ious), fn=-min(len(ious), better[true].fn))
            better[predicted] += Counts(fp=-min(len(ious), better[predicted].fp))
        return better, number
    for category in chosen:
        own = counts[category]
        if kind == "outline":
            better[category], number = own._replace(iou=float(own.tp)), number + own.tp
        elif kind == "missed":
            explained = sum(len(ious) for (true, _), ious in mistaken.items() if true == category)
            missed = max(0, own.fn - explained)
            better[category], number = own._replace(fn=own.fn - missed), number + missed
        else:
            explained = sum(len(ious) for (_, predicted), ious in mistaken.items() if predicted == category)
            nothing = max(0, own.fp - explained)
            better[category], number = own._replace(fp=own.fp - nothing), number + nothing
    return better, number


def _quality(counts: Mapping[int, Counts]) -> float | None:
    """PQ: the mean over the categories that have a segment on either side."""
    values = [own.qualities()["pq"] for own in counts.values()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def stuff_confusion(errors: PanopticErrors) -> np.ndarray:
    """Where the pixels of each stuff class go: int64 [S, S + 2], columns the stuff classes, things, and nothing."""
    rows = {category: row for row, category in enumerate(errors.stuff)}
    table = np.zeros((len(rows), len(rows) + 2), dtype=np.int64)
    for (true, predicted), pixels in errors.confusion.pixels.items():
        if true in rows:
            table[rows[true], rows.get(predicted, len(rows) + (predicted == VOID))] += pixels
    return table
