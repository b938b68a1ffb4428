"""Matrix NMS (paper section 2.2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32  # pixels; small enough that few masks touch a tile, large enough for an efficient matrix product
CHUNK_VALUES = 2**20  # mask values of one class per product: they stay in the CPU's cache
# Products of bytes, with sums in int32, are four to six times as fast as those of float32 on CPUs with AVX-512.
MULTIPLIES_BYTES = torch.backends.cpu.get_cpu_capability() == "AVX512"


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
        sigma: strength of the gaussian kernel, see above.

    Returns:
        Decayed scores, [N], of the dtype of `scores`, in input order and never above the input.

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

    Pairs of different classes may be left at 0. 0 and 1 are exact in any type, and in float32 so are sums below 2^24
    pixels. An accelerator multiplies all pairs faster than it could select some; a CPU works tile by tile on the
    masks that touch the tile, or class by class where that is less work.
    """
    with torch.autocast(masks.device.type, enabled=False):
        if masks.is_cuda and torch.version.hip is None:  # tensor cores multiply bf16 and sum in float32
            halves = masks.flatten(1).bfloat16()
            return torch.mm(halves, halves.T, out_dtype=torch.float32)
        if masks.device.type != "cpu":
            flat = masks.flatten(1).float()
            return flat @ flat.T
        groups = list(_cut_into_tiles(masks))
        order, (_, counts) = labels.argsort(stable=True), labels.unique(return_counts=True)
        if int((counts**2).sum()) * len(groups) < sum(len(members) ** 2 for members, _ in groups):
            groups = [
                (own, part[own])
                for own in order.split(counts.tolist())
                for part in masks.flatten(1).split(max(1, CHUNK_VALUES // len(own)), dim=1)
            ]
        shared = torch.zeros(len(masks), len(masks), dtype=torch.int32 if MULTIPLIES_BYTES else torch.float32)
        for members, part in groups:
            shared[members[:, None], members] += _multiply(part)
    return shared.float()


def _cut_into_tiles(masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Bool masks [N, h, w] on a CPU -> (indices of the n masks that touch it, bool [n, pixels]) for every tile.

    Tiles at the right border are filled up with zeros. Eight pixels are moved as one number.
    """
    for rows in masks.view(torch.uint8).split(TILE, dim=1):
        padded = F.pad(rows, (0, -rows.shape[2] % TILE)).contiguous()
        eights = padded.view(torch.int64).unflatten(2, (-1, TILE // 8))  # [N, rows, columns of tiles, TILE / 8]
        tiles = eights.permute(2, 0, 1, 3).flatten(2)  # [columns of tiles, N, pixels / 8]
        for touching, tile in zip(tiles.any(2), tiles):
            members = touching.nonzero()[:, 0]
            yield members, tile[members].view(torch.bool)


def _multiply(masks: Tensor) -> Tensor:
    """Intersections of bool masks [n, pixels] on a CPU: int32 [n, n] if `MULTIPLIES_BYTES`, else float32 [n, n]."""
    if MULTIPLIES_BYTES:
        values = masks.view(torch.int8)
        return torch._int_mm(values, values.T)
    flat = masks.float()
    return flat @ flat.T
