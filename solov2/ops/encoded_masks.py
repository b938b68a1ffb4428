"""The masks of one image as COCO segmentations: hundreds of instances in a large image, without a plane for each.

Nearest-neighbor resizing, crops, flips and transposition only choose the source row and column of each pixel. The
choice is remembered and applied when masks are drawn, straight at the final size and a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solov2.ops.masks import CHUNK_BYTES, draw_window, planes_at_once, run_lengths
from solov2.ops.resize import source_indices


@dataclass(frozen=True, eq=False)
class EncodedMasks:
    """N masks of one image. `shape`, `flip`, `mT` and indexing are those of a tensor [N, h, w] of the masks."""

    segmentations: list[list | dict[str, Any]]  # of the annotated image; all have passed `check_segmentation`
    size: tuple[int, int]  # (h, w) of that image
    axes: tuple[np.ndarray, np.ndarray]  # int64 [h] and [w]: source pixels of the rows and of the columns, monotone
    transposed: bool = False  # whether `axes[0]` are columns of the annotated image, and `axes[1]` its rows

    @classmethod
    def from_segmentations(cls, segmentations: Sequence[list | dict[str, Any]], size: tuple[int, int]) -> EncodedMasks:
        """Masks of COCO segmentations of an image of `size` (h, w), all of which have passed `check_segmentation`."""
        return cls(list(segmentations), size, (np.arange(size[0]), np.arange(size[1])))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, h, w)."""
        return len(self), len(self.axes[0]), len(self.axes[1])

    def __len__(self) -> int:
        return len(self.segmentations)

    def __getitem__(self, keep: Tensor) -> EncodedMasks:
        """The masks where `keep`, bool [N], is True."""
        kept = [x for x, wanted in zip(self.segmentations, keep.tolist(), strict=True) if wanted]
        return replace(self, segmentations=kept)

    def resize(self, size: tuple[int, int]) -> EncodedMasks:
        """Resize to `size` (h, w), as `resize_masks` does."""
        first, second = (axis[source_indices(len(axis), target)] for axis, target in zip(self.axes, size))
        return replace(self, axes=(first, second))

    def crop(self, rows: slice, columns: slice) -> EncodedMasks:
        """The part of each mask in these rows and columns."""
        return replace(self, axes=(self.axes[0][rows], self.axes[1][columns]))

    def flip(self, dims: Sequence[int]) -> EncodedMasks:
        """Reverse dimensions: 1 is top to bottom, 2 left to right."""
        first, second = (axis[::-1] if dim in dims else axis for dim, axis in enumerate(self.axes, start=1))
        return replace(self, axes=(first, second))

    @property
    def mT(self) -> EncodedMasks:  # noqa: N802, the name in torch
        """Transpose each mask."""
        return replace(self, axes=self.axes[::-1], transposed=not self.transposed)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw the masks in order, as many at a time as fit into `max_bytes`, but at least one.

        Yields:
            masks: uint8 [n, h, w]; one chunk of n = 0 where there are no masks.
            extents: int64 [n, 4], boxes x1, y1, x2, y2, maximum exclusive, outside of which the masks are 0.
        """
        number, height, width = self.shape
        rows, columns = self.axes[::-1] if self.transposed else self.axes
        grid = _Grid(rows, columns, self.size)
        step = planes_at_once((height, width), max_bytes)
        for start in range(0, max(1, number), step):
            lengths = run_lengths(self.segmentations[start : start + step], self.size)
            planes = np.zeros((len(lengths), height, width), dtype=np.uint8)
            # The grid's rows and columns are the final ones, or their transposition.
            views = planes.transpose(0, 2, 1) if self.transposed else planes
            extents = torch.tensor([grid.draw(*pair) for pair in zip(lengths, views)], dtype=torch.int64).reshape(-1, 4)
            yield torch.from_numpy(planes), extents[:, [1, 0, 3, 2]] if self.transposed else extents


class _Grid:
    """Draws masks of an image of `size` (h, w) at some of its rows and columns.

    Args:
        rows, columns: source pixels, int64 [h'] and [w'], monotone; they may repeat, where a mask is enlarged.
        size: (h, w) of the image.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]) -> None:
        # Runs are shortened to the distinct rows and columns, drawn, and then spread to all of them.
        (distinct_rows, self.rows), (distinct_columns, self.columns) = (
            np.unique(axis, return_inverse=True) for axis in (rows, columns)
        )
        self.source_height, self.height = size[0], len(distinct_rows)
        self.rows_before = np.searchsorted(distinct_rows, np.arange(size[0]))  # source row -> distinct rows above it
        self.columns_before = np.searchsorted(distinct_columns, np.arange(size[1] + 1))
        self.is_drawn = np.isin(np.arange(size[1] + 1), distinct_columns)

    def draw(self, lengths: np.ndarray, plane: np.ndarray) -> tuple[int, int, int, int]:
        """Draw one mask into `plane`, uint8 zeros [h', w'], and return a box x1, y1, x2, y2 around it."""
        source_columns, source_rows = np.divmod(lengths.cumsum(), self.source_height)
        within = np.where(self.is_drawn[source_columns], self.rows_before[source_rows], 0)
        ends = self.columns_before[source_columns] * self.height + within
        window, (x1, y1, x2, y2) = draw_window(np.diff(ends, prepend=0), self.height)  # [columns, rows]
        left, right = _span(self.columns, x1, x2)
        top, bottom = _span(self.rows, y1, y2)
        rows, columns = self.rows[top:bottom] - y1, self.columns[left:right] - x1
        plane[top:bottom, left:right] = window.T.take(columns, axis=1).take(rows, axis=0)
        return left, top, right, bottom


def _span(axis: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """The range [begin, end) of the indices in `axis`, which is monotone, whose values lie in [start, stop)."""
    inside = np.flatnonzero((axis >= start) & (axis < stop))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
