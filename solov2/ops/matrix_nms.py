"""Matrix NMS (paper section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

VALUES_AT_ONCE = 2**20  # of the masks as float32: they stay in the processor's cache
ROWS_AT_ONCE = 64  # of the upper triangle; what lies below it in these blocks is computed in vain


def matrix_nms(
    masks: Tensor, labels: Tensor, scores: Tensor, *, kernel: str = "gaussian", sigma: float = 2.0
) -> Tensor:
    """Decay every score by its overlap with higher-scored masks of the same class, all at once.

    decay_j = min_i f(iou_ij) / f(max_k iou_ki) over the higher-scored i of j's class, with f(iou) = exp(-sigma iou^2)
    (gaussian) or 1 - iou (linear). A suppressor that is itself an exact duplicate (f = 0 in the linear kernel, 0/0 in
    the formula) is left out: the first of the duplicates already gives 0.

    Args:
        masks: bool [N, h, w], sorted by descending score.
        labels: int64 [N].
        scores: float [N], descending.
        kernel: "gaussian" or "linear".
        sigma: of the gaussian kernel.

    Returns:
        Decayed scores, [N], in input order and never above the input.

    Raises:
        ValueError: unknown kernel.
    """
    if kernel not in ("gaussian", "linear"):
        raise ValueError(f"Matrix NMS kernel must be 'gaussian' or 'linear', got {kernel!r}")
    if len(scores) == 0:
        return scores.clone()
    # Only masks of one class meet, so all work is done class by class: in this order each class is one block.
    order = labels.argsort(stable=True)
    _, counts = labels[order].unique_consecutive(return_counts=True)
    precision = torch.promote_types(scores.dtype, torch.float32)
    decay = torch.ones(len(scores), dtype=precision, device=scores.device)
    start = 0
    for count in counts.tolist():
        own = order[start : start + count]
        start += count
        if count > 1:
            decay[own] = _decay(_intersections(masks[own].flatten(1)).to(precision), kernel, sigma)
    return (scores * decay).to(scores.dtype)


def _decay(intersections: Tensor, kernel: str, sigma: float) -> Tensor:
    """Factors [n], at most 1, of the masks of one class; intersections [n, n]: upper triangle, areas diagonal."""
    area = intersections.diagonal()
    iou = (intersections / (area[:, None] + area[None] - intersections).clamp(min=1)).triu(1)  # [i, j]: i suppresses j
    compensation = iou.amax(0)[:, None]  # of suppressor i by those above it
    if kernel == "gaussian":
        decay = torch.exp(-sigma * (iou**2 - compensation**2))
    else:
        decay = torch.where(compensation < 1, (1 - iou) / (1 - compensation), torch.ones_like(iou))
    # Pairs that do not count have iou 0, hence decay f(0) / f(compensation) >= 1.
    return decay.amin(0).clamp(max=1)


def _intersections(masks: Tensor) -> Tensor:
    """Pixels that each two of the masks [n, pixels] share: upper triangle of float32 [n, n], the rest zero or filled.

    0 and 1 are exact in float32, and so are the sums below 2^24 pixels.
    """
    shared = torch.zeros(len(masks), len(masks), device=masks.device)
    with torch.autocast(masks.device.type, enabled=False):
        for part in masks.split(max(1, VALUES_AT_ONCE // len(masks)), dim=1):
            flat = part.float()
            for start in range(0, len(flat), ROWS_AT_ONCE):
                block = slice(start, start + ROWS_AT_ONCE)
                shared[block, start:].addmm_(flat[block], flat[start:].T)
    return shared
