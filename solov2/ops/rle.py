"""Operations on the RLEs of one image that never draw more than the window of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from solov2.ops.masks import draw_window, rle_from_columns, run_lengths

Rle = dict[str, Any]
Box = tuple[int, int, int, int]  # x1, y1, x2, y2, maximum exclusive


def window(rle: Rle) -> tuple[np.ndarray, Box]:
    """The pixels of a mask inside its tight box, uint8 [columns, rows], and the box; zeros for an empty mask."""
    height, width = rle["size"]
    [lengths] = run_lengths([rle], (height, width))
    return draw_window(lengths, height)


def placed(rle: Rle, corner: tuple[int, int], size: tuple[int, int]) -> tuple[Rle, Box]:
    """The mask of a part of an image in the whole image, and its tight box.

    Args:
        rle: of the part.
        corner: (row, column) of the first pixel of the part in the image; the mask must lie within the image.
        size: (h, w) of the image.
    """
    pixels, (x1, y1, _, _) = window(rle)
    moved, box = rle_from_columns(pixels.astype(bool), (corner[0] + y1, corner[1] + x1), size)
    return moved, _integers(box)


def cropped(rle: Rle, box: Box) -> Rle:
    """The part of a mask inside a box of its image, as a mask of that part."""
    pixels, (x1, y1, x2, y2) = window(rle)
    left, top, right, bottom = max(x1, box[0]), max(y1, box[1]), min(x2, box[2]), min(y2, box[3])
    part = pixels[max(left - x1, 0) : max(right - x1, 0), max(top - y1, 0) : max(bottom - y1, 0)]
    corner = (max(top - box[1], 0), max(left - box[0], 0))
    return rle_from_columns(part.astype(bool), corner, (box[3] - box[1], box[2] - box[0]))[0]


def mirrored(rle: Rle) -> tuple[Rle, Box]:
    """The mask with left and right exchanged, and its tight box."""
    height, width = rle["size"]
    pixels, (_, y1, x2, _) = window(rle)
    flipped, box = rle_from_columns(pixels[::-1].astype(bool), (y1, width - x2), (height, width))
    return flipped, _integers(box)


def union(rles: Sequence[Rle]) -> tuple[Rle, Box]:
    """The union of masks of one image, and its tight box."""
    merged = coco_mask.merge(list(rles))
    x, y, width, height = coco_mask.toBbox(merged).tolist()
    box = _integers((x, y, x + width, y + height))
    return {"size": list(merged["size"]), "counts": merged["counts"].decode("ascii")}, box


def voted(rles: Sequence[Rle], weights: Sequence[float]) -> tuple[Rle, Box]:
    """The pixels that masks of more than half of the weight have, and their tight box."""
    windows = [(pixels, box) for pixels, box in map(window, rles)]
    boxes = np.array([box for _, box in windows if box != (0, 0, 0, 0)] or [(0, 0, 0, 0)])
    (left, top), (right, bottom) = boxes[:, :2].min(0).tolist(), boxes[:, 2:].max(0).tolist()
    total = np.zeros((right - left, bottom - top))
    for (pixels, (x1, y1, x2, y2)), weight in zip(windows, weights, strict=True):
        if pixels.size:
            total[x1 - left : x2 - left, y1 - top : y2 - top] += weight * pixels
    height, width = rles[0]["size"]
    rle, box = rle_from_columns(total > sum(weights) / 2, (top, left), (height, width))
    return rle, _integers(box)


def ious(first: Sequence[Rle], second: Sequence[Rle]) -> np.ndarray:
    """IoU of each mask with each other: float64 [n, m]; 0 for two empty masks."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    found = coco_mask.iou(list(first), list(second), [0] * len(second))
    return np.nan_to_num(np.asarray(found, dtype=np.float64))


def _integers(box: Sequence[float]) -> Box:
    x1, y1, x2, y2 = (int(value) for value in box)
    return x1, y1, x2, y2
