"""Mask probabilities -> binary masks at the size of the photograph, computed only where a pixel can be set.

The reference interpolates every probability map twice as a whole: to the padded input, of which the image's corner is
kept, and from there to the photograph. Both steps are linear and separable, so together they are one small matrix per
axis, of at most three neighboring source pixels per target pixel; and since a target pixel is a convex combination of
its sources, it can exceed the threshold only where one of them does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solov2.ops.masks import masks_to_boxes, rle_from_columns

BAND = 64  # target rows computed at once: so few that each band needs few source rows
COLUMNS = 256  # target columns computed at once, for the same reason
STRIDE = 4  # of the mask features


class Axis:
    """The two interpolations along one axis as a matrix [target, source], zero but for three neighbors per row.

    Args:
        source: cells of the mask features.
        inside: pixels of the image inside the padded input (STRIDE times `source`).
        target: pixels of the photograph.
        dtype, device: of the probabilities.
    """

    def __init__(self, source: int, inside: int, target: int, dtype: torch.dtype, device: torch.device) -> None:
        near, far, far_share = _neighbors(target, inside, dtype)  # photograph -> input
        low, high, high_share = _neighbors(STRIDE * source, source, dtype)  # input -> mask features
        matrix = np.zeros((target, source))
        rows = np.arange(target)
        for pixel, share in ((near, 1 - far_share), (far, far_share)):
            np.add.at(matrix, (rows, low[pixel]), share * (1 - high_share[pixel]))
            np.add.at(matrix, (rows, high[pixel]), share * high_share[pixel])
        self.matrix = torch.from_numpy(matrix).to(device, dtype)
        self.first, self.last = low[near], high[far]  # outermost sources of each target pixel, both ascending

    def targets_of(self, start: int, stop: int) -> tuple[int, int]:
        """The range of target pixels that any source pixel in [start, stop) contributes to."""
        begin = int(np.searchsorted(self.last, start))
        return begin, max(begin, int(np.searchsorted(self.first, stop)))

    def sources_of(self, start: int, stop: int) -> tuple[int, int]:
        """The range of source pixels that contribute to the target pixels in [start, stop), which is not empty."""
        return int(self.first[start]), int(self.last[stop - 1]) + 1


def _neighbors(target: int, source: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear interpolation without aligned corners: both neighbors of each target pixel, and the second's share.

    Positions are rounded as `torch.nn.functional.interpolate` rounds them: in float32, scale times position minus half
    in one step. At the far end of a photograph that is a ten thousandth of a pixel away from the exact position.
    """
    wanted = np.float64 if dtype == torch.float64 else np.float32
    scale = float(wanted(source) / wanted(target))
    position = np.maximum((scale * (np.arange(target) + 0.5) - 0.5).astype(wanted), 0)
    near = np.minimum(position.astype(np.int64), source - 1)
    return near, np.minimum(near + 1, source - 1), (position - near).astype(wanted)


class MaskResampler:
    """Brings mask probabilities of one image to the size of its photograph and cuts them at a threshold.

    Args:
        feature_size: (h, w) of the probability maps, at stride 4 of the padded input.
        size: (height, width) of the image inside the padded input.
        original_size: (height, width) of the photograph.
        threshold: a pixel is set where its probability is above it.
        dtype, device: of the probabilities.
    """

    def __init__(
        self,
        feature_size: Sequence[int],
        size: tuple[int, int],
        original_size: tuple[int, int],
        threshold: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.original_size, self.threshold = original_size, threshold
        self.rows, self.columns = (
            Axis(*sizes, dtype, device) for sizes in zip(feature_size, size, original_size, strict=True)
        )

    def planes(self, soft: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [n, h, w] -> (masks bool [n, H, W], their tight boxes float32 [n, 4])."""
        size = len(soft), *self.original_size
        if soft.device.type == "cpu":  # numpy's zeros take no memory until something is written into them
            masks = torch.from_numpy(np.zeros(size, dtype=bool))
        else:
            masks = torch.zeros(size, dtype=torch.bool, device=soft.device)
        boxes = torch.zeros(len(soft), 4, device=soft.device)
        for mask, box, plane, window in zip(masks, boxes, soft, self._windows(soft)):
            for top, bottom, left, right, values in self._bands(plane, window):
                torch.gt(values, self.threshold, out=mask[top:bottom, left:right])
            top, bottom, left, right = window
            box.copy_(_box(mask[top:bottom, left:right], top, left))
        return masks, boxes

    def run_lengths(self, soft: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
        """Probabilities [n, h, w] -> (compressed COCO run lengths, tight boxes float32 [n, 4]), without full planes."""
        rles, boxes = [], torch.zeros(len(soft), 4)
        for i, (plane, window) in enumerate(zip(soft, self._windows(soft))):
            top, bottom, left, right = window
            mask = np.zeros((right - left, bottom - top), dtype=bool)  # columns first, as COCO counts
            for start, stop, _, _, values in self._bands(plane, window):
                mask[:, start - top : stop - top] = (values > self.threshold).T.cpu().numpy()
            rle, box = rle_from_columns(mask, (top, left), self.original_size)
            rles.append(rle)
            boxes[i] = torch.tensor(box)
        return rles, boxes.to(soft.device)

    def _windows(self, soft: Tensor) -> list[tuple[int, int, int, int]]:
        """(top, bottom, left, right) of the photograph's pixels that may be set, per map; all zeros where none may."""
        windows = []
        for left, top, right, bottom in masks_to_boxes(soft > self.threshold).long().tolist():
            if right == left:
                windows.append((0, 0, 0, 0))
            else:
                windows.append((*self.rows.targets_of(top, bottom), *self.columns.targets_of(left, right)))
        return windows

    def _bands(self, plane: Tensor, window: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int, int, Tensor]]:
        """(top, bottom, left, right, probabilities) of a window, some rows at a time."""
        top, bottom, left, right = window
        if top == bottom or left == right:
            return
        first_row, last_row = self.rows.sources_of(top, bottom)
        wide = plane.new_empty(last_row - first_row, right - left)
        for start in range(left, right, COLUMNS):
            stop = min(start + COLUMNS, right)
            begin, end = self.columns.sources_of(start, stop)
            weights = self.columns.matrix[start:stop, begin:end]
            torch.mm(plane[first_row:last_row, begin:end], weights.T, out=wide[:, start - left : stop - left])
        band = BAND if plane.device.type == "cpu" else bottom - top  # each band is a wait for an accelerator
        for start in range(top, bottom, band):
            stop = min(start + band, bottom)
            begin, end = self.rows.sources_of(start, stop)
            weights = self.rows.matrix[start:stop, begin:end]
            yield start, stop, left, right, weights @ wide[begin - first_row : end - first_row]


def _box(window: Tensor, top: int, left: int) -> Tensor:
    """Tight box of the pixels set in a window that starts at (top, left); zeros where none is."""
    (box,) = masks_to_boxes(window[None])
    return torch.where(box[2] > 0, box + box.new_tensor([left, top, left, top]), box)
