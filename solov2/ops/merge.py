"""Instances and semantic labels -> one segment per pixel, by the rule of Panoptic FPN (Kirillov et al. 2019).

Instances come first, the best first, and take the pixels that are still free; stuff gets the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solov2.ops.masks import draw_window, masks_to_boxes, run_lengths
from solov2.ops.panoptic import measure_segments


def merge_segments(
    instances: Mapping[str, Any],
    semantic: Tensor,
    num_stuff: int,
    *,
    score_threshold: float,
    overlap_threshold: float,
    stuff_area_limit: int,
) -> dict[str, Any]:
    """Merge the instances and the semantic labels of an image.

    RLEs, and planes on the host, are merged window by window; planes on an accelerator without a wait per instance.

    Args:
        instances: scores [N], labels int64 [N], masks bool [N, H, W] or N RLEs, and with planes optionally boxes
            [N, 4], tight (x1, y1, x2, y2, maximum exclusive); without them the planes are searched.
        semantic: uint8 [H, W], the stuff label of each pixel; other values, such as `num_stuff`, are no stuff.
        num_stuff: number of stuff classes.
        score_threshold: minimum score of an instance.
        overlap_threshold: an instance is left out if a larger share of its mask is already taken.
        stuff_area_limit: minimum pixels of a stuff segment.

    Returns:
        panoptic_map: int32 [H, W] on the host, 0 for no segment, else the id of one.
        segments: dictionaries in the order of their ids 1, 2, ...: id, label (thing or stuff label), is_thing, score
            (None for stuff), area in pixels, box (x1, y1, x2, y2 of the pixels it got, maximum exclusive) and instance
            (index of the instance; None for stuff).
    """
    scores, masks = instances["scores"], instances["masks"]
    order = scores.argsort(descending=True, stable=True)
    enough = scores[order] >= score_threshold  # in the dtype of the scores
    if isinstance(masks, Tensor) and masks.device.type != "cpu":
        ids, kept, stuff = merge_planes(masks, order, enough, semantic, num_stuff, overlap_threshold, stuff_area_limit)
    else:
        ids = np.zeros(semantic.shape, dtype=np.int32)
        ranked = order[enough].tolist()
        kept = paint_things(ids, _windows(instances, ranked), overlap_threshold)
        kept = [ranked[place] for place in kept]
        stuff = _paint_stuff(ids, semantic.cpu().numpy(), num_stuff, len(kept), stuff_area_limit)
    table = measure_segments(ids)
    labels, scores = instances["labels"].tolist(), scores.tolist()
    found = [{"label": labels[i], "is_thing": True, "score": scores[i], "instance": i} for i in kept]
    found += [{"label": label, "is_thing": False, "score": None, "instance": None} for label in stuff]
    rows = zip(*(column.tolist() for column in table), found, strict=True)
    segments = [{"id": number, **entry, "area": area, "box": tuple(box)} for number, area, box, entry in rows]
    return {"panoptic_map": torch.from_numpy(ids), "segments": segments}


Window = tuple[np.ndarray, tuple[int, int, int, int]]  # bool [h, w] and its box x1, y1, x2, y2


def _windows(instances: Mapping[str, Any], ranked: Sequence[int]) -> Iterator[Window]:
    """The masks of some instances, one at a time."""
    masks, boxes = instances["masks"], instances.get("boxes")
    for index in ranked:
        if isinstance(masks, Tensor):
            box = masks_to_boxes(masks[index, None])[0] if boxes is None else boxes[index]
            x1, y1, x2, y2 = box.int().tolist()
            yield masks[index, y1:y2, x1:x2].numpy(), (x1, y1, x2, y2)
        else:
            size = masks[index]["size"]
            columns, extent = draw_window(run_lengths([masks[index]], (size[0], size[1]))[0], size[0])
            yield columns.T.view(bool), extent


def paint_things(ids: np.ndarray, windows: Iterator[Window], overlap_threshold: float) -> list[int]:
    """Paint windows on a map, int32 [H, W], with the ids 1, 2, ...; returns the places in the order of those kept."""
    kept: list[int] = []
    for place, (window, (x1, y1, x2, y2)) in enumerate(windows):
        below = ids[y1:y2, x1:x2]
        free = window & (below == 0)
        area, left = np.count_nonzero(window), np.count_nonzero(free)
        if left and not (area - left) / area > overlap_threshold:
            kept.append(place)
            below[free] = len(kept)
    return kept


def _paint_stuff(ids: np.ndarray, semantic: np.ndarray, num_stuff: int, count: int, area_limit: int) -> list[int]:
    """Give the free pixels of a map with `count` segments to stuff; returns the labels that got some."""
    free = ids == 0
    areas = np.bincount(semantic[free], minlength=num_stuff)[:num_stuff]
    labels = np.flatnonzero((areas > 0) & (areas >= area_limit))
    numbers = np.zeros(256, dtype=np.int32)  # of each label
    numbers[labels] = count + 1 + np.arange(len(labels))
    np.copyto(ids, numbers[semantic], where=free)
    return labels.tolist()


def merge_planes(
    masks: Tensor,
    order: Tensor,
    enough: Tensor,
    semantic: Tensor,
    num_stuff: int,
    overlap_threshold: float,
    stuff_area_limit: int,
) -> tuple[np.ndarray, list[int], list[int]]:
    """Merge on an accelerator: every decision stays on the device until the map and the decisions are copied at once.

    Args:
        masks: bool [N, H, W].
        order: int64 [N], descending by score.
        enough: bool [N], in this order: whether the score suffices.
        semantic, num_stuff, overlap_threshold, stuff_area_limit: as in `merge_segments`.

    Returns:
        (map int32 [H, W], instances in the order of their ids, stuff labels likewise).
    """
    ids = torch.zeros(semantic.shape, dtype=torch.int32, device=semantic.device)
    wide = torch.float32 if ids.device.type == "mps" else torch.float64  # which mps lacks
    count, kept = ids.new_zeros(()), []
    for index, wanted in zip(order[:, None], enough):
        mask = masks.index_select(0, index)[0]
        free = mask & (ids == 0)
        area, left = mask.sum(), free.sum()
        keep = wanted & (left > 0) & ~((area - left).to(wide) / area > overlap_threshold)
        count = count + keep
        ids += (free & keep) * count
        kept.append(keep)
    free = ids == 0
    areas = [((semantic == label) & free).sum() for label in range(num_stuff)]
    chosen = torch.stack([(area > 0) & (area >= stuff_area_limit) for area in areas]) if areas else enough[:0]
    for label, (take, rank) in enumerate(zip(chosen, chosen.cumsum(0))):
        ids += ((semantic == label) & free & take) * (count + rank).int()
    decisions = torch.cat([torch.where(torch.stack(kept), order, -1) if kept else order, chosen.long()]).tolist()
    instances, stuff = decisions[: len(order)], decisions[len(order) :]
    return ids.cpu().numpy(), [i for i in instances if i >= 0], [s for s, take in enumerate(stuff) if take]
