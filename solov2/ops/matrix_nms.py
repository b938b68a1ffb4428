"""Matrix NMS (paper section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor


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
    count = len(scores)
    if count == 0:
        return scores.clone()
    # 0/1 in float32 are exact, and so are the sums below 2^24 pixels; from there on the precision of the scores counts.
    flat = masks.reshape(count, -1).float()
    precision = torch.promote_types(scores.dtype, torch.float32)
    with torch.autocast(masks.device.type, enabled=False):
        intersection = (flat @ flat.T).to(precision)
    area = flat.sum(1).to(precision)
    iou = intersection / (area[:, None] + area[None] - intersection).clamp(min=1)
    above = torch.ones(count, count, dtype=torch.bool, device=masks.device).triu(1)
    counted = above & (labels[:, None] == labels[None])
    iou = torch.where(counted, iou, 0)  # [i, j]: i suppresses j
    compensation = iou.amax(0)[:, None]  # of suppressor i by those above it
    if kernel == "gaussian":
        decay = torch.exp(-sigma * (iou**2 - compensation**2))
    else:
        decay = torch.where(compensation < 1, (1 - iou) / (1 - compensation), torch.ones_like(iou))
    # Pairs that do not count have iou 0, hence decay f(0) / f(compensation) >= 1.
    return (scores * decay.amin(0).clamp(max=1)).to(scores.dtype)
