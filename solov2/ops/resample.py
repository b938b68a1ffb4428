"""Mask probabilities -> binary masks at the original image size, computed only where a pixel can be set.

The reference interpolates every full probability map twice: to the padded input, which is then cropped to the image,
and from there to the original size. Both steps are linear and separable, so together they are one small matrix per
axis, with at most three neighboring source pixels per target pixel; and since a target pixel is a convex combination of
its sources, it can exceed the threshold only where one of them does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solov2.ops.masks import masks_to_boxes, rle_from_columns, rles_of_columns

ROW_CHUNK = 64  # target rows computed together: few, so that they need few source rows
COLUMN_CHUNK = 256  # target columns computed together, for the same reason
PLANE_BYTES = 2**29  # of the planes that an accelerator computes together
STRIDE = 4  # of the mask features


class Axis:
    """Both interpolations along one axis as a matrix [target, source] with at most three nonzero neighbors per row.

    Args:
        source: pixels of the mask features.
        inside: pixels of the image inside the padded input, which has STRIDE times `source`.
        target: pixels of the original image.
        dtype, device: of the probabilities.
    """

    def __init__(self, source: int, inside: int, target: int, dtype: torch.dtype, device: torch.device) -> None:
        near, far, far_weight = _neighbors(target, inside, dtype)  # original image -> input
        low, high, high_weight = _neighbors(STRIDE * source, source, dtype)  # input -> mask features
        matrix = np.zeros((target, source))
        rows = np.arange(target)
        for pixel, weight in ((near, 1 - far_weight), (far, far_weight)):
            np.add.at(matrix, (rows, low[pixel]), weight * (1 - high_weight[pixel]))
            np.add.at(matrix, (rows, high[pixel]), weight * high_weight[pixel])
        self.matrix = torch.from_numpy(matrix).to(device, dtype, non_blocking=True)
        self.first, self.last = low[near], high[far]  # outermost sources of each target pixel, both ascending

    def target_range(self, start: int, stop: int) -> tuple[int, int]:
        """The range [begin, end) of target pixels to which the source pixels in [start, stop) contribute."""
        begin = int(np.searchsorted(self.last, start))
        return begin, max(begin, int(np.searchsorted(self.first, stop)))

    def source_range(self, start: int, stop: int) -> tuple[int, int]:
        """The range [begin, end) of source pixels that contribute to target pixels in [start, stop), start < stop."""
        return int(self.first[start]), int(self.last[stop - 1]) + 1


def _neighbors(target: int, source: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear interpolation without aligned corners: both neighbors of each target pixel, and the second's weight.

    Positions are rounded as `torch.nn.functional.interpolate` rounds them: in float32, scale times position minus half
    in one step. At the far end of a large image this differs from the exact position by a ten-thousandth of a pixel.
    """
    float_type = np.float64 if dtype == torch.float64 else np.float32
    scale = float(float_type(source) / float_type(target))
    position = np.maximum((scale * (np.arange(target) + 0.5) - 0.5).astype(float_type), 0)
    near = np.minimum(position.astype(np.int64), source - 1)
    return near, np.minimum(near + 1, source - 1), (position - near).astype(float_type)


class MaskResampler:
    """Resizes the mask probabilities of one image to its original size and thresholds them.

    Args:
        feature_size: (h, w) of the probability maps, at stride 4 of the padded input.
        size: (height, width) of the image inside the padded input.
        original_size: (height, width) of the masks to return.
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

    def to_masks(self, soft: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [n, h, w] -> (masks bool [n, H, W], their tight boxes float32 [n, 4])."""
        if soft.device.type != "cpu":
            return self.planes_to_masks(soft)
        masks = torch.from_numpy(np.zeros((len(soft), *self.original_size), dtype=bool))  # no memory until written to
        boxes = torch.zeros(len(soft), 4)
        for mask, box, plane, window in zip(masks, boxes, soft, self._windows(soft)):
            for top, bottom, left, right, values in self._bands(plane, window):
                torch.gt(values, self.threshold, out=mask[top:bottom, left:right])
            top, bottom, left, right = window
            box.copy_(_box(mask[top:bottom, left:right], top, left))
        return masks, boxes

    def to_rles(self, soft: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
        """Probabilities [n, h, w] -> (n compressed COCO RLEs, tight boxes float32 [n, 4]), without full-size masks."""
        if soft.device.type != "cpu":
            return self.planes_to_rles(soft)
        rles, boxes = [], torch.zeros(len(soft), 4)
        for i, (plane, window) in enumerate(zip(soft, self._windows(soft))):
            top, bottom, left, right = window
            mask = np.zeros((right - left, bottom - top), dtype=bool)  # columns first, the order of COCO's runs
            for start, stop, _, _, values in self._bands(plane, window):
                mask[:, start - top : stop - top] = (values > self.threshold).T.numpy()
            rle, box = rle_from_columns(mask, (top, left), self.original_size)
            rles.append(rle)
            boxes[i] = torch.tensor(box)
        return rles, boxes

    def planes_to_masks(self, soft: Tensor) -> tuple[Tensor, Tensor]:
        """`to_masks` for accelerators: whole planes of many masks at once, without waiting for the device."""
        masks = torch.empty(len(soft), *self.original_size, dtype=torch.bool, device=soft.device)
        for some, planes in zip(masks.split(self._planes_at_once), soft.split(self._planes_at_once)):
            some.copy_(self._thresholded(planes))
        return masks, masks_to_boxes(masks)

    def planes_to_rles(self, soft: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
        """`to_rles` for accelerators: the host waits once for many masks, for the borders of their runs."""
        rles, boxes = [], [torch.zeros(0, 4, device=soft.device)]
        for planes in soft.split(self._planes_at_once):
            masks = self._thresholded(planes)
            boxes.append(masks_to_boxes(masks))
            rles += rles_of_columns(masks.mT)
        return rles, torch.cat(boxes)

    def _thresholded(self, soft: Tensor) -> Tensor:
        return self.rows.matrix @ (soft @ self.columns.matrix.T) > self.threshold  # [n, H, W]

    @property
    def _planes_at_once(self) -> int:
        height, width = self.original_size
        return max(1, PLANE_BYTES // (8 * height * width))  # float32, and up to four planes of bool

    def _windows(self, soft: Tensor) -> list[tuple[int, int, int, int]]:
        """Per map (top, bottom, left, right) of the target pixels that may be set; all zeros where none may."""
        windows = []
        for left, top, right, bottom in masks_to_boxes(soft > self.threshold).long().tolist():
            if right == left:
                windows.append((0, 0, 0, 0))
            else:
                windows.append((*self.rows.target_range(top, bottom), *self.columns.target_range(left, right)))
        return windows

    def _bands(self, plane: Tensor, window: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int, int, Tensor]]:
        """(top, bottom, left, right, probabilities) of a window, a band of rows at a time."""
        top, bottom, left, right = window
        if top == bottom or left == right:
            return
        first_row, last_row = self.rows.source_range(top, bottom)
        resized = plane.new_empty(last_row - first_row, right - left)
        for start in range(left, right, COLUMN_CHUNK):
            stop = min(start + COLUMN_CHUNK, right)
            begin, end = self.columns.source_range(start, stop)
            weights = self.columns.matrix[start:stop, begin:end]
            torch.mm(plane[first_row:last_row, begin:end], weights.T, out=resized[:, start - left : stop - left])
        for start in range(top, bottom, ROW_CHUNK):
            stop = min(start + ROW_CHUNK, bottom)
            begin, end = self.rows.source_range(start, stop)
            weights = self.rows.matrix[start:stop, begin:end]
            yield start, stop, left, right, weights @ resized[begin - first_row : end - first_row]


def _box(window: Tensor, top: int, left: int) -> Tensor:
    """Tight box of the set pixels of a window that starts at (top, left); zeros if none is set."""
    (box,) = masks_to_boxes(window[None])
    return torch.where(box[2] > 0, box + box.new_tensor([left, top, left, top]), box)
