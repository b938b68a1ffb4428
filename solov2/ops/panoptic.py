"""Panoptic maps: every pixel has the id of its segment, 0 for none; and their storage as RGB, as in COCO's PNGs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike
from torch import Tensor, from_numpy

MAX_SEGMENT_ID = 2**24 - 1  # three bytes
IGNORED = 255  # label of pixels in a semantic map that nobody has annotated, or that do not count
Array = TypeVar("Array", np.ndarray, Tensor)


def ids_from_rgb(pixels: Array) -> Array:
    """The segment ids that colors stand for: R + 256 G + 65536 B.

    Args:
        pixels: uint8 [H, W, 3], an array or a tensor on the host.

    Returns:
        int32 [H, W], of the same type.
    """
    if isinstance(pixels, Tensor):
        return from_numpy(ids_from_rgb(pixels.numpy()))
    padded = np.zeros((*pixels.shape[:2], 4), dtype=np.uint8)  # the bytes of the ids, lowest first
    padded[..., :3] = pixels
    return padded.view("<i4")[..., 0].astype(np.int32, copy=False)


def rgb_from_ids(ids: Array) -> Array:
    """The colors that stand for segment ids: R = id % 256, G = id // 256 % 256, B = id // 65536.

    Args:
        ids: integers [H, W], an array or a tensor on the host.

    Returns:
        uint8 [H, W, 3], of the same type.

    Raises:
        ValueError: an id is negative or has more than 24 bits.
    """
    if isinstance(ids, Tensor):
        return from_numpy(rgb_from_ids(ids.numpy()))
    if ids.size and not (0 <= ids.min() and ids.max() <= MAX_SEGMENT_ID):
        raise ValueError(f"segment ids must be 0 to {MAX_SEGMENT_ID}, not {ids.min()} to {ids.max()}")
    values = np.ascontiguousarray(ids, dtype="<i4")[..., None]
    return np.ascontiguousarray(values.view(np.uint8)[..., :3])


def swap_red_and_blue(ids: np.ndarray) -> np.ndarray:
    """The ids [N] whose colors have red and blue exchanged."""
    return (ids & 255) << 16 | ids & 0xFF00 | ids >> 16


class SegmentTable(NamedTuple):
    """The segments of a map, ordered by id.

    ids int64 [N] | areas int64 [N], in pixels | boxes int64 [N, 4] x1, y1, x2, y2, tight, maximum exclusive
    """

    ids: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray


def measure_segments(ids: np.ndarray) -> SegmentTable:
    """Area and box of every segment of a map, integers [H, W]; 0 is none."""
    height, width = ids.shape
    starts = _run_starts(ids)
    rows, left = np.divmod(starts, width)
    lengths = np.diff(starts, append=height * width)
    values = ids.reshape(-1)[starts].astype(np.int64)
    order = np.flatnonzero(values)
    order = order[np.argsort(values[order], kind="stable")]
    if not len(order):
        return SegmentTable(*(np.zeros(shape, dtype=np.int64) for shape in ((0,), (0,), (0, 4))))
    found, first = np.unique(values[order], return_index=True)
    rows, left, lengths = rows[order], left[order], lengths[order]
    x1, y1 = (np.minimum.reduceat(start, first) for start in (left, rows))
    x2, y2 = (np.maximum.reduceat(end, first) for end in (left + lengths, rows + 1))
    return SegmentTable(found, np.add.reduceat(lengths, first), np.stack((x1, y1, x2, y2), axis=1))


def replace_ids(ids: np.ndarray, values: Mapping[int, int], *, other: int, dtype: DTypeLike) -> np.ndarray:
    """The map, integers [H, W], with every id replaced by its value in `values`, or by `other` if it has none."""
    starts = _run_starts(ids)
    distinct, inverse = np.unique(ids.reshape(-1)[starts], return_inverse=True)
    replaced = np.array([values.get(number, other) for number in distinct.tolist()], dtype=dtype)
    return np.repeat(replaced[inverse], np.diff(starts, append=ids.size)).reshape(ids.shape)


def count_pairs(first: np.ndarray, second: np.ndarray) -> dict[tuple[int, int], int]:
    """Number of pixels of each pair of ids that two maps, integers [H, W], have at the same place, in ascending order.

    Ids are 0 to `MAX_SEGMENT_ID`; 0 counts as any other.
    """
    codes = first.astype(np.int64) << 24 | second  # 48 bits
    starts = _run_starts(codes)
    pairs, inverse = np.unique(codes.reshape(-1)[starts], return_inverse=True)
    counts = np.bincount(inverse, weights=np.diff(starts, append=codes.size)).astype(np.int64)  # exact below 2^53
    return {(pair >> 24, pair & MAX_SEGMENT_ID): count for pair, count in zip(pairs.tolist(), counts.tolist())}


def _run_starts(values: np.ndarray) -> np.ndarray:
    """Positions, in the flattened map [H, W], at which a run of equal values in a row starts."""
    starts = np.ones(values.shape, dtype=bool)
    starts[:, 1:] = values[:, 1:] != values[:, :-1]
    return np.flatnonzero(starts)
