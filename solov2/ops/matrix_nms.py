"""Matrix NMS (paper section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 32  # pixels; small enough that few masks touch a tile, large enough for an efficient matrix product
CHUNK_VALUES = 2**20  # mask values of one class per product, as float32: they stay in the CPU's cache


def matrix_nms(
    masks: Tensor, labels: Tensor, scores: Tensor, *, kernel: str = "gaussian", sigma: float = 2.0
) -> Tensor:
    """Decay every score by its overlap with higher-scored masks of the same class, all at once.

    decay_j = min_i f(iou_ij) / f(max_k iou_ki) over the higher-scored i of j's class, with f(iou) = exp(-sigma iou^2)
    (gaussian) or 1 - iou (linear). A suppressor that is itself an exact duplicate (f = 0 in the linear kernel, 0/0 in
    the formula) is ignored: the first of the duplicates already gives 0.

    Args:
        masks: bool [N, h, w] (or [N, pixels], which is slower on a CPU), sorted by descending score.
        labels: int64 [N].
        scores: float [N], descending.
        kernel: "gaussian" or "linear".
        sigma: of the gaussian kernel, see above.

    Returns:
        Decayed scores, [N], in input order and never above the input.

    Raises:
        ValueError: unknown kernel.
    """
    if kernel not in ("gaussian", "linear"):
        raise ValueError(f"Matrix NMS kernel must be 'gaussian' or 'linear', got {kernel!r}")
    if len(scores) == 0:
        return scores.clone()
    intersections = _intersections(masks if masks.ndim == 3 else masks.flatten(1)[:, None], labels)
    return decay_scores(intersections, labels, scores, kernel=kernel, sigma=sigma)


def decay_scores(
    intersections: Tensor, labels: Tensor, scores: Tensor, *, kernel: str = "gaussian", sigma: float = 2.0
) -> Tensor:
    """The decay of `matrix_nms` for given intersections; no shape depends on a value.

    Args:
        intersections: [..., N, N] in pixels, the areas on the diagonal.
        labels: int64 [..., N].
        scores: float [..., N], descending.
        kernel, sigma: as in `matrix_nms`.

    Returns:
        Decayed scores, [..., N].
    """
    intersections = intersections.to(torch.promote_types(scores.dtype, torch.float32))
    area = intersections.diagonal(dim1=-2, dim2=-1)
    iou = intersections / (area[..., :, None] + area[..., None, :] - intersections).clamp(min=1)
    iou = torch.where(labels[..., :, None] == labels[..., None, :], iou, 0).triu(1)  # [i, j]: i suppresses j
    compensation = iou.amax(-2)[..., :, None]  # [..., N, 1], highest IoU of suppressor i with a mask above it
    if kernel == "gaussian":
        decay = torch.exp(-sigma * (iou**2 - compensation**2))
    else:
        decay = torch.where(compensation < 1, (1 - iou) / (1 - compensation), torch.ones_like(iou))
    # Pairs that do not count have IoU 0, hence a decay f(0) / f(compensation) >= 1, which the clamp makes 1.
    return (scores * decay.amin(-2).clamp(max=1)).to(scores.dtype)


def _intersections(masks: Tensor, labels: Tensor) -> Tensor:
    """Pairwise intersections of bool masks [N, h, w], in pixels: float32 [N, N], areas on the diagonal.

    Pairs of different classes may be left at 0. 0 and 1 are exact in bf16 and float32, and in float32 so are sums below
    2^24 pixels. An accelerator multiplies all pairs faster than it could select some; a CPU works tile by tile on the
    masks that touch the tile, or class by class where that is less work.
    """
    with torch.autocast(masks.device.type, enabled=False):
        if masks.is_cuda and torch.version.hip is None:  # tensor cores multiply bf16 and sum in float32
            halves = masks.flatten(1).bfloat16()
            return torch.mm(halves, halves.T, out_dtype=torch.float32)
        if masks.device.type != "cpu":
            flat = masks.flatten(1).float()
            return flat @ flat.T
        tiles = [tile for rows in masks.split(TILE, dim=1) for tile in rows.split(TILE, dim=2)]
        groups = [(tile.contiguous().view(torch.uint8).flatten(1).amax(1).nonzero()[:, 0], tile) for tile in tiles]
        order, (_, counts) = labels.argsort(stable=True), labels.unique(return_counts=True)
        if int((counts**2).sum()) * len(tiles) < sum(len(touching) ** 2 for touching, _ in groups):
            groups = [
                (own, part)
                for own in order.split(counts.tolist())
                for part in masks.flatten(1).split(max(1, CHUNK_VALUES // len(own)), dim=1)
            ]
        shared = torch.zeros(len(masks), len(masks))
        for members, part in groups:
            flat = part[members].flatten(1).float()
            shared[members[:, None], members] += flat @ flat.T
    return shared
