"""Sizes and resizing: the one place where an image's size after scaling and padding is decided.

The rules are those of mmdetection 3.3 (OpenCV underneath): training and evaluation of published weights depend on them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from solov2.ops.masks import masks_to_boxes


def resized_size(size: tuple[int, int], *, long: int, short: int) -> tuple[int, int]:
    """(h, w) scaled, ratio kept, to the largest size whose long edge is <= `long` and short edge <= `short`."""
    factor = min(long / max(size), short / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def padded_size(size: tuple[int, int], divisor: int = 32) -> tuple[int, int]:
    """(h, w) rounded up to multiples of `divisor`."""
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [3, h, w] to uint8 [3, H, W], bilinear and without antialiasing, as OpenCV does.

    OpenCV rounds its fixed-point weights differently: about one value in five differs, by 1 grey level at most.
    Interleaved memory (what `read_image` gives) is twice as fast as planes; the result has the layout of the input.
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return TF.resize(image, list(size), antialias=False)


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [N, h, w] on the host to uint8 [N, H, W] by nearest neighbour.

    Source index = floor(i * scale) in double precision (OpenCV's INTER_NEAREST); torch's "nearest" computes in
    float32 and picks the other neighbour now and then.
    """
    if tuple(masks.shape[1:]) == tuple(size):
        return masks
    rows, columns = (_source_indices(n, m) for n, m in zip(masks.shape[1:], size))
    resized = np.zeros((len(masks), *size), dtype=np.uint8)
    # Objects are small: only the pixels of each one's box are touched, with numpy's take, which is several times
    # faster on bytes than index_select.
    for target, source, (x1, y1, x2, y2) in zip(resized, masks.numpy(), masks_to_boxes(masks).long().tolist()):
        top, bottom = np.searchsorted(rows, (y1, y2))
        left, right = np.searchsorted(columns, (x1, x2))
        window = source[y1:y2, x1:x2].take(columns[left:right] - x1, axis=1)
        target[top:bottom, left:right] = window.take(rows[top:bottom] - y1, axis=0)
    return torch.from_numpy(resized)


def quarter_masks(masks: Tensor) -> Tensor:
    """Masks of 0 and 1, uint8 [N, h, w], at a quarter of the resolution: uint8 [N, ceil(h / 4), ceil(w / 4)].

    Zero-padded to multiples of 4; a pixel is 1 where at least two of the four centre pixels of its 4x4 block are 1.
    That is OpenCV's bilinear resize of uint8 by 1/4, which makes the mask targets of mmdetection.
    """
    return (_center_pairs(_center_pairs(masks, 1), 2) >= 2).to(torch.uint8)


def _center_pairs(masks: Tensor, dim: int) -> Tensor:
    """Sum of the two middle pixels of every block of four along `dim`; what lies beyond the end is zero."""
    shape = list(masks.shape)
    shape[dim] = -(-shape[dim] // 4)
    pairs = masks.new_zeros(shape)
    for offset in (1, 2):
        part = masks[(slice(None),) * dim + (slice(offset, None, 4),)]
        pairs.narrow(dim, 0, part.shape[dim]).add_(part)
    return pairs


def _source_indices(source: int, target: int) -> np.ndarray:
    scale = 1.0 / (target / source)  # the double rounding is OpenCV's
    return np.minimum((np.arange(target) * scale).astype(np.int64), source - 1)
