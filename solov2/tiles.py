"""Prediction of large photographs in overlapping tiles, whose instances are joined across the borders.

The tiles are predicted one after the other, each at the model's input scale. Two instances of the same class in two
tiles are the same object if their masks have an IoU above 0.5 in the strip that the tiles share. If one of them touches
a border of its tile inside the photograph, it is cut there, and the two are joined: the mask is their union, the score
the higher one. If both are whole, the one with the higher score stays. All masks are RLEs, so that memory does not grow
with instances times pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from solov2.errors import InputError
from solov2.ops.images import ImageLike, to_rgb_tensor
from solov2.ops.rle import Box, Rle, cropped, ious, placed, union
from solov2.views import View, as_result, predict_views

SAME = 0.5  # IoU in the shared strip above which two instances are one object
MIN_TILE = 32  # pixels
MASK_STRIDE = 4  # input pixels for each value of a mask before it is resized


@dataclass
class Fragment:
    """An instance as one tile has it, with its mask and box in the photograph."""

    score: float
    label: int
    rle: Rle
    box: Box
    is_cut: bool  # at a border of the tile inside the photograph


def predict_tiles(
    model: Any,
    image: ImageLike,
    tile: int,
    *,
    overlap: int | None = None,
    views: Sequence[View] = (),
    score_threshold: float | None = None,
    max_instances: int | None = None,
    batch_size: int = 1,
    precision: str = "tf32",
) -> dict[str, Any]:
    """Segment the instances of a large photograph tile by tile.

    Args:
        model: a `SOLOv2` without a semantic head.
        image: what `SOLOv2.predict` takes.
        tile: side of a tile in pixels of the photograph. Objects should be smaller than a tile.
        overlap: minimum number of pixels that neighboring tiles share; default: a quarter of a tile. Objects up to this
            size lie whole in at least one tile.
        views: for test-time augmentation of each tile, see `solov2.views.parse_views`.
        score_threshold, batch_size, precision: as in `SOLOv2.predict`.
        max_instances: maximum number of instances per tile, 0 for no limit; default: the model's.

    Returns:
        What `SOLOv2.predict` returns for an image, with masks as RLEs, on the host; the number of instances in the
        whole photograph is not limited.

    Raises:
        InputError: the model is panoptic, the tile is too small, or the overlap is not smaller than the tile.
        ValueError, TypeError: as in `SOLOv2.predict`.
    """
    if model.semantic_head is not None:
        raise InputError("tiles are joined by their instances, so they do not work with panoptic models")
    overlap = tile // 4 if overlap is None else overlap
    if tile < MIN_TILE or not 0 <= overlap < tile:
        raise InputError(f"a tile needs at least {MIN_TILE} pixels and a smaller overlap, not {tile} and {overlap}")
    pixels = to_rgb_tensor(image)
    size = (pixels.shape[1], pixels.shape[2])
    boxes = tile_boxes(size, tile, overlap)
    crops = (pixels[:, y1:y2, x1:x2] for x1, y1, x2, y2 in boxes)
    margin = math.ceil(MASK_STRIDE * tile / min(model.input_scale))
    results = predict_views(
        model,
        crops,
        views or [View()],
        score_threshold=score_threshold,
        max_instances=max_instances,
        batch_size=batch_size,
        precision=precision,
    )
    fragments = [list(_fragments(result, box, size, margin)) for box, result in zip(boxes, results, strict=True)]
    return join_fragments(fragments, boxes)


def tile_boxes(size: tuple[int, int], tile: int, overlap: int) -> list[Box]:
    """The boxes x1, y1, x2, y2 of equal tiles that cover an image of `size` (h, w) and share `overlap` pixels or more.

    A side of the image below `tile` is covered by one tile of that side.
    """
    (rows, height), (columns, width) = ((_starts(side, tile, overlap), min(tile, side)) for side in size)
    return [(x, y, x + width, y + height) for y in rows for x in columns]


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    if side <= tile:
        return [0]
    count = math.ceil((side - overlap) / (tile - overlap))
    return [round(place * (side - tile) / (count - 1)) for place in range(count)]


def _fragments(result: dict[str, Any], tile: Box, size: tuple[int, int], margin: int) -> Iterator[Fragment]:
    """The instances of a tile in the photograph; those that come within `margin` of an inner border count as cut."""
    inner = [tile[0] > 0, tile[1] > 0, tile[2] < size[1], tile[3] < size[0]]
    rows = zip(result["scores"].tolist(), result["labels"].tolist(), result["masks"], strict=True)
    for score, label, mask in rows:
        rle, box = placed(mask, (tile[1], tile[0]), size)
        if box[2] > box[0]:
            near = any(abs(own - border) <= margin and here for own, border, here in zip(box, tile, inner))
            yield Fragment(score, label, rle, box, near)


def join_fragments(fragments: Sequence[Sequence[Fragment]], tiles: Sequence[Box]) -> dict[str, Any]:
    """The instances of all tiles by the rule of this module: those of each tile, and the box of each tile."""
    everything = [fragment for own in fragments for fragment in own]
    numbers = {id(fragment): number for number, fragment in enumerate(everything)}
    groups = _Groups(len(everything))
    for (first, box), (second, other) in itertools.combinations(zip(fragments, tiles, strict=True), 2):
        for one, two in _same(first, second, _shared(box, other)):
            groups.join(numbers[id(one)], numbers[id(two)])
    joined = []
    for members in groups.members():
        parts = [everything[member] for member in members]
        best = max(parts, key=lambda part: part.score)
        whole = not any(part.is_cut for part in parts)
        rle, box = (best.rle, best.box) if whole or len(parts) == 1 else union([part.rle for part in parts])
        joined.append((best.score, best.label, rle, box))
    return as_result(sorted(joined, key=lambda instance: -instance[0]))


def _shared(first: Box, second: Box) -> Box:
    return max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3])


def _same(first: Sequence[Fragment], second: Sequence[Fragment], strip: Box) -> Iterator[tuple[Fragment, Fragment]]:
    """The pairs of instances of two tiles that are the same object in the strip that the tiles share."""
    if strip[0] >= strip[2] or strip[1] >= strip[3]:
        return
    one, two = ([fragment for fragment in own if _touches(fragment.box, strip)] for own in (first, second))
    overlap = ious(*([cropped(fragment.rle, strip) for fragment in own] for own in (one, two)))
    for (row, left), (column, right) in itertools.product(enumerate(one), enumerate(two)):
        if left.label == right.label and overlap[row, column] > SAME:
            yield left, right


def _touches(box: Box, strip: Box) -> bool:
    x1, y1, x2, y2 = _shared(box, strip)
    return x1 < x2 and y1 < y2


class _Groups:
    """Which of n things belong together."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def _root(self, member: int) -> int:
        while self._parents[member] != member:
            member = self._parents[member]
        return member

    def join(self, first: int, second: int) -> None:
        self._parents[self._root(second)] = self._root(first)

    def members(self) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for member in range(len(self._parents)):
            found.setdefault(self._root(member), []).append(member)
        return list(found.values())
