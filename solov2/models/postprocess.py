"""Raw outputs -> instances (Wang et al. 2020, sections 2.1.3, 2.1.4, 2.2; steps and thresholds are mmdetection's).

Steps: points NMS, category threshold, masks, mask scores, Matrix NMS, score threshold, masks at the original size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solov2.compute import span
from solov2.ops.matrix_nms import matrix_nms
from solov2.ops.resample import MaskResampler
from solov2.settings import PostprocessSettings

CELL_CHUNK = 512  # cells whose masks exist together; those of all 3872 cells at 800 x 1344 pixels would fill 1 GB
PIXEL_CHUNK = 2048  # mask pixels per product on a CPU: their probabilities stay in its cache until they are summed


@dataclass
class Candidates:
    """(cell, class) pairs of one image, sorted by descending score.

    scores float32 [n] (float64 for a float64 network), labels int64 [n], cells int64 [n] (index into the concatenated
    levels), masks bool [n, h, w] at stride 4.
    """

    scores: Tensor
    labels: Tensor
    cells: Tensor
    masks: Tensor


@torch.no_grad()
def postprocess(
    raw: dict[str, Any],
    sizes: Tensor | Sequence[Sequence[int]],
    original_sizes: Tensor | Sequence[Sequence[int]],
    settings: PostprocessSettings,
    *,
    mask_format: str = "bool",
) -> list[dict[str, Any]]:
    """Find the instances in every image of a batch.

    Args:
        raw: category_logits, kernels (lists over levels of [B, C, S, S], [B, E, S, S]) and mask_features [B, E, h, w],
            with h = H / 4 and w = W / 4. Half-precision inputs are computed in float32, even under autocast.
        sizes: int64 [B, 2], (height, width) of each image inside the padded input, in input pixels.
        original_sizes: int64 [B, 2], (height, width) of the masks to return.
        settings: thresholds and limits.
        mask_format: "bool" for masks bool [N, H, W], "rle" for a list of N COCO RLEs.

    Returns:
        Per image: scores float32 [N] descending, labels int64 [N], masks, boxes float32 [N, 4] (x1, y1, x2, y2 of the
        mask, maximum exclusive; zeros for an empty mask). Shapes, dtypes and device also hold for N = 0.

    Raises:
        ValueError: unknown mask_format.
    """
    if mask_format not in ("bool", "rle"):
        raise ValueError(f"mask_format must be 'bool' or 'rle', got {mask_format!r}")
    results = []
    with torch.autocast(raw["mask_features"].device.type, enabled=False):
        with span("candidates"):
            scores, kernels, area_thresholds = flatten_raw(raw, settings)  # [B, cells, C], [B, cells, E], [cells]
        for i, (size, original_size) in enumerate(zip(_size_pairs(sizes), _size_pairs(original_sizes), strict=True)):
            features = widen(raw["mask_features"][i])  # [E, h, w]
            with span("candidates"):
                candidates = select_candidates(scores[i], kernels[i], features, area_thresholds, settings)  # n
            with span("Matrix NMS"):
                kept = suppress(candidates, settings)  # N of them
            with span("masks"):
                masks, boxes = final_masks(
                    kept.cells, kernels[i], features, size, original_size, settings.mask_threshold, mask_format
                )  # [N, H, W], [N, 4]
            results.append({"scores": kept.scores, "labels": kept.labels, "masks": masks, "boxes": boxes})
    return results


def flatten_raw(raw: dict[str, Any], settings: PostprocessSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate the levels of a batch, cells in row-major order: the inputs of `select_candidates` per image.

    Returns:
        category scores after points NMS [B, cells, C] (float32 for half-precision inputs), kernels [B, cells, E], area
        thresholds float32 [cells] in pixels.
    """
    logits = raw["category_logits"]  # [B, C, S, S]
    category_scores = [flatten_level(suppress_neighbors(widen(level).sigmoid())) for level in logits]  # [B, S * S, C]
    kernels = [flatten_level(level) for level in raw["kernels"]]  # [B, S * S, E]
    area_thresholds = [
        torch.full((level.shape[2:].numel(),), float(threshold), device=level.device)
        for level, threshold in zip(logits, settings.area_thresholds, strict=True)
    ]  # [S * S]
    return torch.cat(category_scores, dim=1), torch.cat(kernels, dim=1), torch.cat(area_thresholds)


def widen(x: Tensor) -> Tensor:
    """Promote half precision to float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def flatten_level(level: Tensor) -> Tensor:
    """[B, C, S, S] -> [B, S * S, C], cells row-major."""
    return level.flatten(2).transpose(1, 2)


def suppress_neighbors(scores: Tensor) -> Tensor:
    """Points NMS: zero a score that is below its upper, left or upper-left neighbor of the same class.

    Adjacent cells tend to predict the same object, and one of them is enough: dropping the others here saves computing
    their masks. As in the authors' code; the paper does not mention it.

    [B, C, S, S] -> [B, C, S, S]; ties survive.
    """
    highest = F.max_pool2d(scores, kernel_size=2, stride=1, padding=1)[:, :, :-1, :-1]  # [B, C, S, S]
    return scores * (scores == highest)  # [B, C, S, S]


def apply_kernels(kernels: Tensor, features: Tensor) -> Tensor:
    """Dynamic convolution (equation 1): 1x1 kernels [n, E], mask features [E, h, w] -> probabilities [n, h * w]."""
    return (kernels.to(features.dtype) @ features.flatten(1)).sigmoid()


def score_masks(kernels: Tensor, features: Tensor, threshold: float, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Binary masks of the given cells and the mean probability inside each (SOLO's "maskness").

    Chunked by pixels on a CPU, so that full probability maps are never materialized.

    Args:
        kernels: [n, E].
        features: [E, h, w].
        threshold: a pixel is set where its probability is above it.
        masks: bool [n, h, w], to be filled.

    Returns:
        areas [n] in pixels, mean probabilities [n] (0 for an empty mask).
    """
    features = features.flatten(1)  # [E, h * w]
    kernels = kernels.to(features.dtype)
    pixels = PIXEL_CHUNK if features.device.type == "cpu" else max(1, features.shape[1])
    areas, totals = features.new_zeros(2, len(kernels))  # [n] each
    for part, mask in zip(features.split(pixels, dim=1), masks.view(len(masks), -1).split(pixels, dim=1)):
        soft = (kernels @ part).sigmoid_()  # [n, pixels]
        torch.gt(soft, threshold, out=mask)
        areas += mask.sum(1, dtype=areas.dtype)  # [n]
        totals += soft.mul_(mask).sum(1)  # [n]
    return areas, totals / areas.clamp(min=1)


def select_candidates(
    category_scores: Tensor, kernels: Tensor, features: Tensor, area_thresholds: Tensor, settings: PostprocessSettings
) -> Candidates:
    """The best `max_candidates` (cell, class) pairs of one image, scored by category score times mean mask probability.

    The reference computes the masks of all pairs at once. A pair never scores above its category score, so visiting the
    cells in descending order of category score, and stopping once enough candidates score above the next cell's, gives
    the same result with one mask per cell and bounded memory. The host waits for an accelerator once for the number of
    cells and once per `CELL_CHUNK` of them.

    Args:
        category_scores: [cells, C] after points NMS.
        kernels: [cells, E].
        features: [E, h, w].
        area_thresholds: [cells].
        settings: category_threshold, mask_threshold, max_candidates.
    """
    best = category_scores.amax(1) if category_scores.numel() else category_scores.new_zeros(len(category_scores))
    cells = (best > settings.category_threshold).nonzero()[:, 0]
    cells = cells[best[cells].argsort(descending=True, stable=True)]  # cells above the threshold, best first
    limit = settings.max_candidates if settings.max_candidates > 0 else None
    chunk, following = cells.tensor_split([CELL_CHUNK])
    masks = torch.empty(len(chunk), *features.shape[1:], dtype=torch.bool, device=features.device)
    # Until the search ends, the masks of those found are followed by room for those of the next cells.
    found = Candidates(category_scores.new_empty(0), cells[:0], cells[:0], masks)
    while len(chunk):
        masks = found.masks[len(found.scores) :]  # [m, h, w]
        areas, maskness = score_masks(kernels[chunk], features, settings.mask_threshold, masks)  # [m] each
        maskness = torch.where(areas > area_thresholds[chunk], maskness, -1.0)  # [m], -1 for tiny masks
        order = chunk.argsort()  # [m]: pairs of equal score shall come in the order of their cells
        maskness, own = maskness[order, None], category_scores[chunk[order]]  # [m, 1], [m, C]
        usable = (own > settings.category_threshold) & (maskness > 0)  # [m, C], pairs with a mask
        scores = own * maskness  # [m, C]

        bound = best[following[:1]] if len(following) else math.inf
        final = (usable & (scores >= bound)).sum() + (found.scores >= bound).sum()  # pairs that stay above later ones
        ranks = usable.flatten().cumsum(0)  # [m * C], the k-th pair is where k first appears
        count, final = torch.stack([ranks[-1], final]).tolist()  # the host waits
        pairs = torch.searchsorted(ranks, torch.arange(1, count + 1, device=ranks.device))  # [pairs]
        slots = order[pairs // own.shape[1]]  # [pairs], index of each pair's mask
        new = Candidates(scores.flatten()[pairs], pairs % own.shape[1], chunk[slots], masks)

        enough = limit is not None and final >= limit
        chunk, following = following[: 0 if enough else None].tensor_split([CELL_CHUNK])
        found = _keep_best(limit, found, new, slots, room=len(chunk))
    return found


def _keep_best(limit: int | None, found: Candidates, new: Candidates, slots: Tensor, *, room: int) -> Candidates:
    """The `limit` best of both, with room for more masks.

    Args:
        limit: None for all.
        found, new: `new.masks` has one mask per cell, in memory right after the masks of those found.
        slots: int64, index of each new pair's mask in `new.masks`.
        room: number of masks to leave room for at the end.
    """
    scores, labels = torch.cat([found.scores, new.scores]), torch.cat([found.labels, new.labels])
    cells, count = torch.cat([found.cells, new.cells]), len(found.scores)
    order = scores.argsort(descending=True, stable=True)[:limit]  # [n]
    slots = torch.cat([torch.arange(count, device=slots.device), slots + count])[order]  # [n], in `found.masks`
    masks = found.masks.new_empty(len(order) + room, *found.masks.shape[1:])
    torch.index_select(found.masks, 0, slots, out=masks[: len(order)])
    return Candidates(scores[order], labels[order], cells[order], masks)


def suppress(candidates: Candidates, settings: PostprocessSettings) -> Candidates:
    """Matrix NMS (section 2.2), then the final score threshold and the maximum per image."""
    scores = matrix_nms(
        candidates.masks, candidates.labels, candidates.scores, kernel=settings.nms_kernel, sigma=settings.nms_sigma
    )  # [n], decayed and no longer in descending order
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= settings.score_threshold]
    if settings.max_instances > 0:
        order = order[: settings.max_instances]
    return Candidates(scores[order], candidates.labels[order], candidates.cells[order], candidates.masks[order])


def final_masks(
    cells: Tensor,
    kernels: Tensor,
    features: Tensor,
    size: tuple[int, int],
    original_size: tuple[int, int],
    threshold: float,
    mask_format: str,
) -> tuple[Tensor | list[dict[str, Any]], Tensor]:
    """Masks of the kept cells at the original size, and their tight boxes.

    Probabilities are resized bilinearly to the padded input, cropped to the image, resized bilinearly to the original
    size (both without aligned corners) and compared with the threshold; scores are not recomputed. `MaskResampler`
    computes this only where a pixel can be set; RLEs are made without materializing full-size masks.

    Args:
        cells: int64 [N].
        kernels: [cells, E].
        features: [E, h, w].
        size, original_size: (height, width) of the image inside the padded input, and of the masks to return.
        threshold: a pixel is set where its resized probability is above it.
        mask_format: "bool" or "rle".

    Returns:
        (masks, boxes): bool [N, H, W] or a list of N RLEs; float32 [N, 4].
    """
    resampler = MaskResampler(
        features.shape[-2:], size, original_size, threshold, dtype=features.dtype, device=features.device
    )
    resample = resampler.to_rles if mask_format == "rle" else resampler.to_masks
    parts = []
    for chunk in cells.split(CELL_CHUNK) if len(cells) else [cells]:
        soft = apply_kernels(kernels[chunk], features)  # [m, h * w]
        parts.append(resample(soft.view(len(chunk), *features.shape[-2:])))
    if len(parts) == 1:
        return parts[0]
    masks, boxes = zip(*parts)
    return sum(masks, []) if mask_format == "rle" else torch.cat(masks), torch.cat(boxes)


def _size_pairs(sizes: Tensor | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [(int(height), int(width)) for height, width in rows]
