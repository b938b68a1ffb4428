"""Outputs of an exported panoptic model -> one segment per pixel, in numpy alone.

`merge` is the rule of Panoptic FPN (Kirillov et al. 2019); `solov2.ops.merge` does the same faster. The rest resizes
the outputs of a file that `solov2 export` wrote to the original image:

    session = onnxruntime.InferenceSession("mine.onnx")
    scores, labels, masks, semantic = session.run(None, {"pixels": pixels, "sizes": sizes})
    panoptic_map, segments = panoptic(scores[0], labels[0], masks[0], semantic[0], sizes[0], original_size)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def panoptic(
    scores: np.ndarray,
    labels: np.ndarray,
    masks: np.ndarray,
    semantic: np.ndarray,
    size: Sequence[int],
    original_size: Sequence[int],
    *,
    mask_threshold: float = 0.5,
    score_threshold: float = 0.3,
    overlap_threshold: float = 0.5,
    stuff_area_limit: int = 4096,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Resize the outputs for one image and merge them.

    Args:
        scores: float32 [K], descending, 0 where there is no instance.
        labels: int64 [K].
        masks: float32 [K, H / 4, W / 4], probabilities on the padded input.
        semantic: float32 [S + 1, H / 4, W / 4], logits: stuff labels, then any thing.
        size: (height, width) of the image inside the padded input.
        original_size: (height, width) of the map to return.
        mask_threshold: a pixel above this probability belongs to the mask.
        score_threshold, overlap_threshold, stuff_area_limit: see `merge`.

    Returns:
        What `merge` returns.
    """
    rows, columns = (resizing(*sizes) for sizes in zip(semantic.shape[1:], size, original_size))
    count = int(((scores > 0) & (scores >= score_threshold)).sum())
    found = np.zeros((count, *original_size), dtype=bool)
    for mask, soft in zip(found, masks):  # one plane of floats at a time
        mask[:] = rows @ soft @ columns.T > mask_threshold
    best = np.full(found.shape[1:], -np.inf, dtype=semantic.dtype)
    stuff = np.zeros(found.shape[1:], dtype=np.uint8)
    for channel, logits in enumerate(semantic):  # argmax; the lowest of equally good channels
        values = rows @ logits @ columns.T
        stuff[values > best] = channel
        np.maximum(best, values, out=best)
    return merge(scores[:count], labels[:count], found, stuff, len(semantic) - 1, overlap_threshold, stuff_area_limit)


def merge(
    scores: np.ndarray,
    labels: np.ndarray,
    masks: np.ndarray,
    semantic: np.ndarray,
    num_stuff: int,
    overlap_threshold: float = 0.5,
    stuff_area_limit: int = 4096,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Give every pixel to an instance, the best ones first, to stuff or to nothing.

    Args:
        scores: float32 [N], descending, of the instances good enough to become segments.
        labels, masks: int64 [N] and bool [N, H, W].
        semantic: uint8 [H, W], the stuff label of each pixel; `num_stuff` for things.
        num_stuff: number of stuff classes S.
        overlap_threshold: an instance is left out if a larger share of its mask is already taken.
        stuff_area_limit: minimum pixels of a stuff segment.

    Returns:
        (panoptic_map int32 [H, W], 0 for no segment, else the id of one; segments, in the order of their ids 1, 2, ...:
        id, label (thing or stuff label), is_thing, score and instance (None for stuff), area in pixels.)
    """
    panoptic_map = np.zeros(semantic.shape, dtype=np.int32)
    segments: list[dict[str, Any]] = []

    def add(pixels: np.ndarray, **entry: Any) -> None:
        segments.append({"id": len(segments) + 1, **entry, "area": int(pixels.sum())})
        panoptic_map[pixels] = len(segments)

    for i, (score, label, mask) in enumerate(zip(scores, labels, masks)):
        free = mask & (panoptic_map == 0)
        if free.any() and (mask.sum() - free.sum()) / mask.sum() <= overlap_threshold:
            add(free, label=int(label), is_thing=True, score=float(score), instance=i)
    for label in range(num_stuff):
        free = (semantic == label) & (panoptic_map == 0)
        if free.any() and free.sum() >= stuff_area_limit:
            add(free, label=label, is_thing=False, score=None, instance=None)
    return panoptic_map, segments


def resizing(source: int, inside: int, target: int) -> np.ndarray:
    """Resizing of one axis as a matrix, float32 [target, source]: by 4 to the padded input, cropped, to the original.

    Args:
        source: length of the axis at stride 4 of the padded input.
        inside: of the image inside the padded input.
        target: of the original image.
    """
    return (bilinear(inside, target) @ bilinear(source, 4 * source)[:inside]).astype(np.float32)


def bilinear(source: int, target: int) -> np.ndarray:
    """Bilinear interpolation of one axis, float64 [target, source], as `torch.nn.functional.interpolate` computes it.

    That is without aligned corners, with positions rounded to float32.
    """
    scale = float(np.float32(source) / np.float32(target))
    position = np.maximum((scale * (np.arange(target) + 0.5) - 0.5).astype(np.float32), 0)
    near = np.minimum(position.astype(int), source - 1)
    matrix = np.zeros((target, source))
    matrix[np.arange(target), near] += 1 - (position - near)
    matrix[np.arange(target), np.minimum(near + 1, source - 1)] += position - near
    return matrix
