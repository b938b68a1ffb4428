"""Sizes and resizing: the only place that decides the size of an image after scaling and padding.

The rules are those of mmdetection 3.3 (OpenCV underneath): training and evaluation of published weights depend on them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from solov2.ops.masks import masks_to_boxes

LOG = logging.getLogger(__name__)

HOST_VALUES = 1 << 16  # values that are resized at once on a CPU: their integers stay in its cache
DEVICE_VALUES = 1 << 24  # and on an accelerator, where a few large operations are best


def resized_size(
    size: tuple[int, int], *, long: int, short: int, inside: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(h, w) scaled at a fixed ratio to the largest size with long edge <= `long` and short edge <= `short`.

    `inside` is a (height, width) in which the result must also fit.
    """
    factor = min(long / max(size), short / min(size))
    if inside is not None:
        factor = min(factor, inside[0] / size[0], inside[1] / size[1])
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def padded_size(size: tuple[int, int], divisor: int = 32) -> tuple[int, int]:
    """(h, w) rounded up to multiples of `divisor`."""
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [3, h, w] to uint8 [3, H, W], bilinearly and without antialiasing: exactly the values of OpenCV.

    OpenCV computes in integers, with weights that are multiples of 1/2048. On a CPU it does the work itself where it is
    installed (`pip install "solov2[fast]"`), several times faster and with the same result.

    Args:
        image: on any device, in any memory layout.
        size: (H, W).

    Returns:
        The resized image, on the device of `image`; its memory layout may differ.
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    if image.device.type != "cpu":
        return _resize_on_device(image, size)
    resize = _opencv_resize()
    if resize is not None:
        return _resize_with(resize, image, size)
    return _resize_on_host(image, size)


def _neighbors(source: int, target: int, *, columns: bool) -> tuple[np.ndarray, ...]:
    """The pixels that each target pixel of one axis lies between: first, second, and their weights, int32 [target].

    Weights are in 1/2048. Positions are rounded to float32 and weights to even numbers in ties, as in OpenCV.
    """
    scale = 1.0 / (target / source)  # rounded twice
    position = ((np.arange(target) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(position)
    fraction = position - first
    if columns:  # rows keep their weights outside of the image, where both neighbors are the same row
        fraction[(first < 0) | (first >= source - 1)] = 0
    weights = (np.rint(part * np.float32(2048)).astype(np.int32) for part in (1 - fraction, fraction))
    indices = (first.astype(np.int32) + offset for offset in (0, 1))
    return (*(index.clip(0, source - 1) for index in indices), *weights)


def _resize_on_device(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`resize_image` in 32-bit integers: across, then down, with the roundings of OpenCV."""
    left, right, left_weight, right_weight, top, bottom, top_weight, bottom_weight = (
        torch.from_numpy(values).to(image.device)
        for axis in (2, 1)
        for values in _neighbors(image.shape[axis], size[axis - 1], columns=axis == 2)
    )

    def interpolate(rows: Tensor, weight: Tensor) -> Tensor:
        pixels = image[:, rows].int()
        across = pixels[:, :, left] * left_weight + pixels[:, :, right] * right_weight
        return ((across >> 4) * weight[:, None]) >> 16

    resized = image.new_empty(3, *size)
    band = max(1, DEVICE_VALUES // (3 * max(size[1], image.shape[2])))
    for start in range(0, size[0], band):
        rows = slice(start, start + band)
        sums = interpolate(top[rows], top_weight[rows]) + interpolate(bottom[rows], bottom_weight[rows])
        resized[:, rows] = ((sums + 2) >> 2).to(torch.uint8)
    return resized


def _resize_on_host(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The same in numpy: a few rows at a time, and across in 16-bit integers, of which a CPU computes most at once."""
    pixels = image.numpy()
    left, _, *across = _neighbors(image.shape[2], size[1], columns=True)
    top, bottom, *down = _neighbors(image.shape[1], size[0], columns=False)
    across = [part.astype(np.uint16) for weight in across for part in (weight >> 4, weight & 15)]
    resized = np.empty((3, *size), dtype=np.uint8)
    band = max(1, HOST_VALUES // (3 * size[1]))
    for start in range(0, size[0], band):
        rows = slice(start, start + band)
        first, last = top[start], bottom[rows][-1]
        if last - first < 2 * band:  # enlarged: neighboring rows share their source
            source, above, below = pixels[:, first : last + 1], top[rows] - first, bottom[rows] - first
        else:
            source = pixels[:, np.concatenate((top[rows], bottom[rows]))]
            above, below = np.arange(source.shape[1]).reshape(2, -1)
        lines = _interpolate_columns(source, left, across)
        sums = np.full((3, len(above), size[1]), 2, dtype=np.int32)
        for index, weight in zip((above, below), down):
            terms = lines.take(index, axis=1, mode="clip")
            terms *= weight[rows, None]
            terms >>= 16
            sums += terms
        sums >>= 2
        resized[:, rows] = sums
    return torch.from_numpy(resized)


def _interpolate_columns(pixels: np.ndarray, left: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """uint8 [3, h, w] -> sums of weighted neighbors divided by 16, rounded down: int32 [3, h, W].

    A sum has 19 bits, but a 16th of it fits into 16. Each weight is therefore split into 16 * high + low.

    Args:
        pixels: rows of the source.
        left: index of the left neighbor, int [W]. The right one is the next pixel; at the borders it has no weight.
        weights: left high, left low, right high and right low, uint16 [W].
    """
    left_high, left_low, right_high, right_low = weights
    pairs = pixels.astype(np.uint16)
    pairs[:, :, :-1] |= pairs[:, :, 1:] << 8  # so that both neighbors are picked at once
    firsts = pairs.take(left, axis=2, mode="clip")
    seconds = firsts >> 8
    firsts &= 255
    sums = firsts * left_low
    sums += seconds * right_low
    sums >>= 4
    firsts *= left_high
    sums += firsts
    seconds *= right_high
    sums += seconds
    return sums.astype(np.int32)


def _resize_with(
    resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray], image: Tensor, size: tuple[int, int]
) -> Tensor:
    """Resize with `cv2.resize`, which takes interleaved pixels and (width, height)."""
    return torch.from_numpy(resize(image.permute(1, 2, 0).numpy(), (size[1], size[0]))).permute(2, 0, 1)


@functools.cache
def _opencv_resize() -> Callable[[np.ndarray, tuple[int, int]], np.ndarray] | None:
    """`cv2.resize`, or None if OpenCV is not installed or differs from our own values; tried once per process."""
    try:
        import cv2
    except ImportError:
        return None
    if torch.get_num_threads() == 1:
        cv2.setNumThreads(0)  # as in a DataLoader worker; 1 would wait for threads that a forked process does not have
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 120, 161), dtype=np.uint8))
    for size in ((200, 267), (119, 161), (47, 50)):
        if not torch.equal(_resize_with(cv2.resize, image, size), _resize_on_host(image, size)):
            LOG.warning(
                "OpenCV %s resizes images differently from the versions that training relies on; "
                "using the slower resize of solov2 instead",
                cv2.__version__,
            )
            return None
    return cv2.resize


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


def resize_map(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map of labels [h, w] on the host to [H, W] by nearest neighbor, as `resize_masks` does."""
    rows, columns = (source_indices(n, m) for n, m in zip(labels.shape, size))
    return torch.from_numpy(labels.numpy().take(rows, axis=0).take(columns, axis=1))


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
