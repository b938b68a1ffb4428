"""Semantic logits -> the best label of every pixel at the original image size, tile by tile.

As for masks (`solov2.ops.resample`), two bilinear resizes are one small matrix per axis. All channels at the original
size would fill gigabytes for a photograph, so only those of one tile exist at a time. Each value is a convex
combination of its sources: a channel below another at every source of a tile is below it in the whole tile, and is not
computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solov2.ops.resample import PLANE_BYTES, Axis

TILE = (32, 64)  # pixels: few channels can win inside, and one thread computes it, without waiting for others


def label_map(logits: Tensor, size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """Resize logits to the padded input, crop them to the image, resize them to its original size; take the best.

    Both resizes are bilinear without aligned corners. Labels can differ from those of the two separate steps only where
    the best two logits agree but for rounding.

    Args:
        logits: float32 or float64 [C, h, w] at stride 4 of the padded input, C <= 256.
        size: (height, width) of the image inside the padded input.
        original_size: (H, W) of the map to return.

    Returns:
        uint8 [H, W] on the device of the logits; the lowest of equally good channels.
    """
    if logits.device.type == "cpu":
        return label_tiles(logits, size, original_size, TILE, prune=True)
    rows = max(1, PLANE_BYTES // (8 * len(logits) * original_size[1]))
    # To choose channels the host would have to wait.
    return label_tiles(logits, size, original_size, (rows, original_size[1]), prune=False)


def label_tiles(
    logits: Tensor, size: tuple[int, int], original_size: tuple[int, int], tile: tuple[int, int], *, prune: bool
) -> Tensor:
    """`label_map` in tiles of (height, width) pixels, with or without leaving out the channels that cannot win."""
    axes = zip(logits.shape[1:], size, original_size, strict=True)
    rows, columns = (Axis(*sizes, logits.dtype, logits.device) for sizes in axes)
    labels = torch.empty(original_size, dtype=torch.uint8, device=logits.device)
    for top in range(0, original_size[0], tile[0]):
        bottom = min(top + tile[0], original_size[0])
        first_row, last_row = rows.source_range(top, bottom)
        row_weights = rows.matrix[top:bottom, first_row:last_row]
        for left in range(0, original_size[1], tile[1]):
            right = min(left + tile[1], original_size[1])
            first, last = columns.source_range(left, right)
            sources = logits[:, first_row:last_row, first:last]
            channels = contenders(sources) if prune else None
            kept = sources if channels is None else sources[channels]
            place = labels[top:bottom, left:right]
            if channels is not None and len(channels) == 1:
                place.copy_(channels)  # everywhere
                continue
            values = row_weights @ (kept @ columns.matrix[left:right, first:last].T)
            best = _argmax(values) if prune else values.argmax(0)
            place.copy_(best if channels is None else channels[best])
    return labels


def contenders(logits: Tensor) -> Tensor:
    """The channels of [C, h, w] that are not everywhere below the one with the highest mean: int64, ascending."""
    strongest = logits[logits.mean((1, 2)).argmax()]
    return (logits >= strongest).flatten(1).any(1).nonzero()[:, 0]


def _argmax(values: Tensor) -> Tensor:
    """argmax(0) of [C, h, w], which on a CPU takes many times as long: it reads across the planes."""
    best, highest = torch.zeros(values.shape[1:], dtype=torch.int64), values[0].clone()
    for channel, plane in enumerate(values[1:], 1):
        best.masked_fill_(plane > highest, channel)
        torch.maximum(highest, plane, out=highest)
    return best
