"""Sizes and resizing: the only place that decides the size of an image after scaling and padding.

The rules are those of mmdetection 3.3 (OpenCV underneath): training and evaluation of published weights depend on them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from solov2.ops.masks import masks_to_boxes


def resized_size(size: tuple[int, int], *, long: int, short: int) -> tuple[int, int]:
    """(h, w) scaled at a fixed ratio to the largest size with long edge <= `long` and short edge <= `short`."""
    factor = min(long / max(size), short / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def padded_size(size: tuple[int, int], divisor: int = 32) -> tuple[int, int]:
    """(h, w) rounded up to multiples of `divisor`."""
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [3, h, w] to uint8 [3, H, W], bilinearly and without antialiasing, as OpenCV does.

    OpenCV rounds its fixed-point weights differently: about one value in five differs, by 1 gray level at most.
    Channels-last memory (as from `read_image`) is twice as fast as channels-first; the result keeps the input's layout.
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return TF.resize(image, list(size), antialias=False)


def resize_masks(masks: Tensor, size: tuple[int, int], extents: Tensor | None = None) -> Tensor:
    """Resize uint8 masks [N, h, w] on the host to uint8 [N, H, W] by nearest neighbor.

    Source index = floor(i * scale) in double precision (OpenCV's INTER_NEAREST); torch's "nearest" computes in
    float32 and sometimes picks the other neighbor.

    `extents`, int64 [N, 4] as x1, y1, x2, y2, maximum exclusive, are boxes outside of which the masks are known to be
    0; None computes them.
    """
    old_size = masks.shape[1], masks.shape[2]
    if old_size == tuple(size):
        return masks
    extents = masks_to_boxes(masks).long() if extents is None else extents
    targets = resize_extents(extents, old_size, size).tolist()
    rows, columns = (source_indices(n, m) for n, m in zip(old_size, size))
    resized = np.zeros((len(masks), *size), dtype=np.uint8)
    # Objects are small, so only the pixels in their extents are copied; numpy's take is several times faster on bytes
    # than index_select.
    for target, source, (x1, y1, x2, y2), (left, top, right, bottom) in zip(
        resized, masks.numpy(), extents.tolist(), targets
    ):
        window = source[y1:y2, x1:x2].take(columns[left:right] - x1, axis=1)
        target[top:bottom, left:right] = window.take(rows[top:bottom] - y1, axis=0)
    return torch.from_numpy(resized)


def resize_extents(extents: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """The extents, int64 [N, 4] as x1, y1, x2, y2, after `resize_masks` from `size` to `new_size` (h, w)."""
    rows, columns = (source_indices(n, m) for n, m in zip(size, new_size))
    x, y = (np.searchsorted(indices, extents[:, axis::2].numpy()) for axis, indices in ((0, columns), (1, rows)))
    return torch.from_numpy(np.stack((x, y), axis=2)).flatten(1)


def quarter_masks(masks: Tensor, size: tuple[int, int] | None = None, extents: Tensor | None = None) -> Tensor:
    """Reduce masks [N, h, w] on the host to a quarter of their resolution: uint8 [N, *size].

    They are zero-padded to multiples of 4; a pixel is 1 where at least two of the four center pixels of its 4x4 block
    are 1. This is OpenCV's bilinear resize of uint8 by 1/4, which makes the mask targets of mmdetection.

    Args:
        masks: uint8 of 0 and 1, or bool, [N, h, w].
        size: (h, w) of the result, zero-padded; None for (ceil(h / 4), ceil(w / 4)).
        extents: int64 [N, 4] as x1, y1, x2, y2, maximum exclusive: boxes outside of which the masks are known to be 0.
            None reads everything.
    """
    height, width = masks.shape[1:]
    quarters = np.zeros((len(masks), *(size or (-(-height // 4), -(-width // 4)))), dtype=np.uint8)
    everywhere = [[0, 0, width, height]] * len(masks)
    boxes = everywhere if extents is None else extents.tolist()
    counted = masks.to(torch.uint8).numpy()  # bool + bool would be "or"
    for quarter, mask, (x1, y1, x2, y2) in zip(quarters, counted, boxes):
        top, left = y1 // 4, x1 // 4
        pairs = _middle_row_sums(mask[4 * top : -(-y2 // 4) * 4, 4 * left : -(-x2 // 4) * 4])
        counts = _middle_row_sums(pairs.T).T
        quarter[top : top + len(counts), left : left + counts.shape[1]] = counts >= 2
    return torch.from_numpy(quarters)


def _middle_row_sums(rows: np.ndarray) -> np.ndarray:
    """Sum of the two middle rows of every block of four rows [h, w]; rows beyond the end count as zero."""
    first, second = rows[1::4], rows[2::4]
    pairs = np.zeros((-(-len(rows) // 4), rows.shape[1]), dtype=rows.dtype)
    pairs[: len(first)] = first
    pairs[: len(second)] += second
    return pairs


def source_indices(source: int, target: int) -> np.ndarray:
    """Index of the source pixel of each target pixel on one axis, nearest neighbor: int64 [target], ascending."""
    scale = 1.0 / (target / source)  # rounded twice, as in OpenCV
    return np.minimum((np.arange(target) * scale).astype(np.int64), source - 1)
