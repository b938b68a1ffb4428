"""Binary masks: boxes, centers of mass, and the three encodings of a COCO segmentation.

A COCO segmentation is a list of polygons [x0, y0, x1, y1, ...], or an RLE {"size": [h, w], "counts": ...} with run
lengths as a list (uncompressed) or a string (compressed). Runs go down the columns and start with background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

from solov2.errors import InputError

MAX_DISTANCE = 16  # image sides; a polygon with a point beyond is a mistake, not an object at the border
CHUNK_BYTES = 64 * 2**20  # full-size planes are made in chunks of at most this size, or one at a time


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of bool or uint8 masks [N, h, w]: float32 [N, 4] as x1, y1, x2, y2, maximum exclusive.

    An empty mask has the box 0, 0, 0, 0.
    """
    if masks.numel() == 0:
        return torch.zeros(len(masks), 4, device=masks.device)
    masks = masks.view(torch.uint8)  # reduced several times faster than bool
    if masks.device.type == "cpu":  # numpy has less overhead: half of torch's time for small masks, the same for large
        spans = [_first_and_last_numpy(masks.numpy().max(axis) > 0) for axis in (1, 2)]
        return torch.from_numpy(np.concatenate(spans).T[:, [0, 2, 1, 3]].astype(np.float32, order="C"))
    x1, x2 = _first_and_last(masks.amax(1))
    y1, y2 = _first_and_last(masks.amax(2))
    return torch.stack((x1, y1, x2, y2), dim=1).float()


def _first_and_last_numpy(occupied: np.ndarray) -> np.ndarray:
    """`_first_and_last` of bool [N, n] in numpy, as [2, N]."""
    last = occupied.shape[1] - occupied[:, ::-1].argmax(1)
    return np.stack((occupied.argmax(1), last * occupied.any(1)))


def _first_and_last(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First true index and one past the last of each row of [N, n]; 0 and 0 for an all-false row."""
    flags = (occupied > 0).to(torch.uint8)
    return flags.argmax(1), (flags.shape[1] - flags.flip(1).argmax(1)) * flags.amax(1)


def centers_of_mass(masks: Tensor, extents: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Centers of mass of uint8 masks of 0 and 1 [N, h, w]: (y, x, area), in pixel indices (no half pixel added).

    Integer sums are divided once in float32, as in mmdetection, because the grid cell of an instance can depend on the
    last bit. An empty mask has the center 0, 0.

    Args:
        masks: uint8 [N, h, w].
        extents: int64 [N, 4] as x1, y1, x2, y2, maximum exclusive: boxes outside of which the masks are known to be 0,
            so that only their inside is read. None reads everything.

    Returns:
        y, x: float32 [N]; area: int64 [N], in pixels.
    """
    height, width = masks.shape[1:]
    everywhere = [[0, 0, width, height]] * len(masks)
    sums = []
    # numpy sums bytes ten times faster than torch, and fastest in the narrowest type that holds the sum.
    sum_dtype = np.uint16 if max(height, width) < 2**16 else np.int64
    for mask, (x1, y1, x2, y2) in zip(masks.cpu().numpy(), everywhere if extents is None else extents.tolist()):
        window = mask[y1:y2, x1:x2]
        per_row, per_column = (window.sum(axis=axis, dtype=sum_dtype).astype(np.int64) for axis in (1, 0))
        sums.append((per_row @ np.arange(y1, y2), per_column @ np.arange(x1, x2), per_row.sum()))
    y, x, area = torch.tensor(sums, dtype=torch.int64, device=masks.device).reshape(-1, 3).unbind(1)
    pixels = area.clamp(min=1).float()
    return y.float() / pixels, x.float() / pixels, area


def encode_rle(masks: Tensor) -> list[dict[str, Any]]:
    """Encode bool or uint8 masks [N, h, w] as compressed RLEs; `counts` is a str, so that JSON can hold it."""
    rles: list[dict[str, Any]] = []
    for some in masks.split(planes_at_once((masks.shape[1], masks.shape[2]), CHUNK_BYTES)) if len(masks) else ():
        # pycocotools reads down the columns: passing memory in that order avoids its own, slower transposition.
        columns = some.to(torch.uint8).mT.contiguous().cpu().numpy()  # [n, w, h]
        rles += coco_mask.encode(columns.transpose(2, 1, 0))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in rles]


def planes_at_once(size: tuple[int, int], max_bytes: int) -> int:
    """How many masks of `size` (h, w), one byte per pixel, fit into `max_bytes`; at least 1."""
    return max(1, max_bytes // max(1, size[0] * size[1]))


def rle_from_columns(
    mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]
) -> tuple[dict[str, Any], tuple[float, float, float, float]]:
    """RLE of a mask whose set pixels all lie in a window.

    Args:
        mask: the window, bool [columns, rows]: transposed, since COCO's runs go down the columns.
        corner: (row, column) of the window's first pixel in the image.
        size: (h, w) of the image.

    Returns:
        (compressed RLE as `encode_rle` writes it, tight box x1, y1, x2, y2 with the maximum exclusive, zeros where no
        pixel is set).
    """
    (row, column), (height, width) = corner, size
    padded = np.zeros((mask.shape[0], mask.shape[1] + 1), dtype=np.int8)  # ends every run with its column
    padded[:, :-1] = mask
    steps = np.diff(padded.ravel(), prepend=np.int8(0))
    starts, ends = (np.flatnonzero(steps == step) for step in (1, -1))
    if len(starts) == 0:
        return {"size": [height, width], "counts": _compress_counts([height * width], size)}, (0.0, 0.0, 0.0, 0.0)
    columns, first_rows = np.divmod(starts, padded.shape[1])
    last_rows = ends - columns * padded.shape[1]
    x1, y1 = float(column + columns[0]), float(row + first_rows.min())
    x2, y2 = float(column + columns[-1] + 1), float(row + last_rows.max())
    begin = (columns + column) * height + first_rows + row
    end = (columns + column) * height + last_rows + row
    apart = begin[1:] != end[:-1]  # False where a run goes on in the next column: the two are merged
    begin, end = begin[np.append(True, apart)], end[np.append(apart, True)]
    borders = np.stack((begin, end), axis=1).ravel()
    counts = np.diff(borders, prepend=0).tolist()
    if end[-1] < height * width:
        counts.append(int(height * width - end[-1]))
    return {"size": [height, width], "counts": _compress_counts(counts, size)}, (x1, y1, x2, y2)


def rles_of_columns(columns: Tensor) -> list[dict[str, Any]]:
    """RLEs, as `encode_rle` writes them, of masks on any device, bool [N, w, h]: transposed, as runs go down columns.

    All masks are read in one pass, and only the borders of their runs are copied to the host.
    """
    count, width, height = columns.shape
    if count == 0:
        return []
    flat = columns.flatten(1)
    borders = flat.diff(prepend=flat.new_zeros(count, 1)).nonzero().cpu().numpy()  # rows (mask, first pixel of a run)
    parts = np.split(borders[:, 1], np.searchsorted(borders[:, 0], np.arange(1, count)))
    size = (height, width)
    counts = (np.diff(part, prepend=0, append=height * width) for part in parts)
    return [{"size": [*size], "counts": _compress_counts(lengths.tolist(), size)} for lengths in counts]


def _compress_counts(counts: list[int], size: tuple[int, int]) -> str:
    return coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"].decode("ascii")


def decode_rle(rle: dict[str, Any]) -> Tensor:
    """Decode one RLE, compressed or not, to uint8 [h, w]. Raises InputError if the counts do not fit the size."""
    return segmentation_to_mask(rle, tuple(rle["size"]))


def segmentation_to_mask(segmentation: list | dict[str, Any], size: tuple[int, int]) -> Tensor:
    """Decode one COCO segmentation, of any kind, of an image of `size` (h, w) to uint8 [h, w].

    Raises:
        InputError: as in `check_segmentation`.
    """
    check_segmentation(segmentation, size)
    masks, _ = segmentations_to_masks([segmentation], size)
    return masks[0]


def segmentations_to_masks(
    segmentations: Sequence[list | dict[str, Any]], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Decode the COCO segmentations of one image of `size` (h, w) to masks and their tight boxes.

    They must have passed `check_segmentation`: errors raised here have no helpful message.

    Returns:
        masks: uint8 [N, h, w], a view of column-major memory, the order of the runs, which resizing reads as it is.
        extents: int64 [N, 4], tight boxes x1, y1, x2, y2, maximum exclusive; zeros for an empty mask.
    """
    columns = np.zeros((len(segmentations), size[1], size[0]), dtype=np.uint8)
    extents = []
    for lengths, plane in zip(run_lengths(segmentations, size), columns):
        window, (x1, y1, x2, y2) = draw_window(lengths, size[0])
        plane[x1:x2, y1:y2] = window
        extents.append((x1, y1, x2, y2))
    return torch.from_numpy(columns).mT, torch.tensor(extents, dtype=torch.int64).reshape(-1, 4)


def draw_window(lengths: np.ndarray, height: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Decode the run lengths of one mask, but only the pixels of its tight box.

    Args:
        lengths: int64 run lengths, as from `run_lengths`.
        height: of the image, in pixels.

    Returns:
        (uint8 [columns, rows]: transposed, since runs go down the columns; its box x1, y1, x2, y2, maximum exclusive).
        An empty mask gives [0, 0] and zeros.
    """
    if not lengths[1::2].any():
        return np.zeros((0, 0), dtype=np.uint8), (0, 0, 0, 0)
    # Draw only the columns of the object: decoding full masks, mostly background, takes five times as long.
    ends = lengths.cumsum()
    last = len(ends) // 2 * 2  # number of runs up to the last run of ones
    left, right = int(ends[0]) // height, -(-int(ends[last - 1]) // height)
    inside = np.concatenate(([ends[0] - left * height], lengths[1:last], [right * height - ends[last - 1]]))
    window = np.repeat((np.arange(last + 1) & 1).astype(np.uint8), inside).reshape(-1, height)
    used_columns, used_rows = (np.flatnonzero(window.max(axis=axis)) for axis in (1, 0))
    (x1, x2), (y1, y2) = ((int(used[0]), int(used[-1]) + 1) for used in (used_columns, used_rows))
    return window[x1:x2, y1:y2], (left + x1, y1, left + x2, y2)


def check_segmentation(segmentation: Any, size: tuple[int, int]) -> None:
    """Check the structure of one COCO segmentation of an image of `size` (h, w), without rasterizing it.

    Polygons of fewer than three points are ignored next to valid ones (as in detectron2), but an error on their own.

    Raises:
        InputError: the message says what is wrong; the caller prepends the annotation.
    """
    if isinstance(segmentation, dict):
        _check_rle(segmentation, size)
        return
    if not isinstance(segmentation, list) or not segmentation:
        raise InputError("the segmentation must be a list of polygons or an RLE with size and counts")
    for polygon in segmentation:
        try:
            largest = max(map(abs, polygon), default=0)
            finite = all(map(math.isfinite, polygon))
        except (TypeError, OverflowError):
            raise InputError("a polygon must be a list of numbers x0, y0, x1, y1, ...") from None
        if not finite or len(polygon) % 2:
            raise InputError("a polygon must have an even number of finite coordinates x0, y0, x1, y1, ...")
        # The rasterizer's memory use grows with the length of an edge, and its integers overflow.
        if largest > MAX_DISTANCE * max(size):
            raise InputError(
                f"a polygon coordinate of magnitude {largest:g} is far outside an image of {size[1]} x {size[0]} pixels"
            )
    if max(map(len, segmentation)) < 6:
        raise InputError("a polygon needs at least three points, so 6 numbers (four numbers are not read as a box)")


def _check_rle(rle: dict[str, Any], size: tuple[int, int]) -> None:
    counts = rle.get("counts")
    if rle.get("size") not in (list(size), tuple(size)):
        raise InputError(f"the RLE has size {rle.get('size')}, but its image has [h, w] = {list(size)}")
    if not isinstance(counts, (list, str, bytes)):
        raise InputError("the RLE has no counts; they must be a list of run lengths or a compressed string")
    if isinstance(counts, list) and any(isinstance(length, (float, str, bool)) for length in counts):
        raise InputError("the counts of the RLE must be integer run lengths")
    try:
        lengths = np.asarray(counts, dtype=np.int64) if isinstance(counts, list) else _decode_counts([counts])[0]
    except (ValueError, TypeError, OverflowError):
        raise InputError("the counts of the RLE are not valid run lengths") from None
    area = size[0] * size[1]  # each length is checked before their sum, which could overflow
    if lengths.ndim != 1 or not (0 <= lengths).all() or not (lengths <= area).all() or lengths.sum() != area:
        raise InputError(f"the counts of the RLE do not add up to its size {list(size)}")


def run_lengths(segmentations: Sequence[list | dict[str, Any]], size: tuple[int, int]) -> list[np.ndarray]:
    """int64 run lengths of segmentations of any of the three kinds that have passed `check_segmentation`."""
    counts = []
    for segmentation in segmentations:
        if isinstance(segmentation, list):
            segmentation = segmentation_to_rle(segmentation, size)
        counts.append(segmentation["counts"])
    compressed = iter(_decode_counts([entry for entry in counts if not isinstance(entry, list)]))
    return [np.asarray(entry, dtype=np.int64) if isinstance(entry, list) else next(compressed) for entry in counts]


def _decode_counts(counts: Sequence[str | bytes]) -> list[np.ndarray]:
    """Decode compressed RLE counts to int64 run lengths, all in one pass.

    Each length is written in groups of five bits, lowest first, one character (48 + bits) per group; bit 5 marks that
    more groups follow, and bit 4 of the last group is the sign. From the fourth length on, the difference to the length
    two before is stored.
    """
    parts = [part.encode("ascii") if isinstance(part, str) else part for part in counts]
    if not parts:
        return []
    groups = np.frombuffer(b"".join(parts), dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((groups & 32) == 0)
    if len(groups) == 0 or groups.min() < 0 or groups.max() > 63 or len(last) == 0 or last[-1] != len(groups) - 1:
        raise ValueError("not a compressed RLE")
    first = np.concatenate(([0], last[:-1] + 1))
    sizes = last - first + 1
    if sizes.max() > 10:
        raise ValueError("a run length of more than 50 bits")
    shifts = 5 * (np.arange(len(groups)) - np.repeat(first, sizes))
    values = np.add.reduceat((groups & 31) << shifts, first)
    values -= np.where(groups[last] & 16, np.int64(1) << (5 * sizes), 0)
    separate = np.split(values, np.searchsorted(first, np.cumsum([len(part) for part in parts[:-1]])))
    for lengths in separate:
        lengths[1::2].cumsum(out=lengths[1::2])
        lengths[2::2].cumsum(out=lengths[2::2])
    return separate


def segmentation_to_rle(segmentation: list | dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Convert a COCO segmentation that has passed `check_segmentation` to compressed RLE of `size` (h, w).

    The counts are bytes.
    """
    height, width = size
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.merge([segmentation])  # the counts may be text
