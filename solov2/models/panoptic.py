"""Raw outputs of a network with a semantic branch -> instances, and one segment per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from solov2.compute import span
from solov2.models.postprocess import postprocess, widen
from solov2.ops.label_map import label_map
from solov2.ops.merge import merge_segments
from solov2.settings import PanopticSettings, PostprocessSettings


@torch.no_grad()
def postprocess_panoptic(
    raw: dict[str, Any],
    sizes: Tensor | Sequence[Sequence[int]],
    original_sizes: Tensor | Sequence[Sequence[int]],
    settings: PostprocessSettings,
    panoptic: PanopticSettings,
    *,
    mask_format: str = "rle",
) -> list[dict[str, Any]]:
    """Find the instances in every image of a batch, and assign every pixel to one of them, to stuff or to nothing.

    Args:
        raw: as for `postprocess`, and semantic_logits [B, K + 1, H / 4, W / 4]: K stuff classes, then all things.
        sizes: int64 [B, 2], (height, width) of each image inside the padded input, in input pixels.
        original_sizes: int64 [B, 2], (height, width) of the masks and maps to return.
        settings: thresholds and limits of the instances.
        panoptic: thresholds of the merge.
        mask_format: as for `postprocess`. RLEs need the least memory; "bool" is faster on an accelerator.

    Returns:
        Per image, the result of `postprocess`, and panoptic_map int32 [H, W] and segments from `merge_segments`.

    Raises:
        ValueError: unknown mask_format.
    """
    results = postprocess(raw, sizes, original_sizes, settings, mask_format=mask_format)
    pairs = (torch.as_tensor(values).tolist() for values in (sizes, original_sizes))
    with torch.autocast(raw["semantic_logits"].device.type, enabled=False):
        for result, logits, size, original_size in zip(results, raw["semantic_logits"], *pairs, strict=True):
            with span("semantic labels"):
                semantic = label_map(widen(logits), tuple(size), tuple(original_size))  # [H, W]
            with span("merge"):
                result |= merge_segments(
                    result,
                    semantic,
                    len(logits) - 1,
                    score_threshold=panoptic.panoptic_score_threshold,
                    overlap_threshold=panoptic.panoptic_overlap_threshold,
                    stuff_area_limit=panoptic.stuff_area_limit,
                )
    return results
