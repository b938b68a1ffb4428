"""One graph from pixels to instances (panoptic: and semantic logits), for `torch.export`, ONNX and compilers.

`solov2.models.postprocess` keeps as many candidates as an image needs. Here every step has a fixed number of rows
instead: the best cells, their best (cell, class) pairs, the best instances. No shape depends on a value, as
`torch.export`, ONNX and compilers require.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from solov2.errors import InputError
from solov2.models.optimize import fold_batch_norms, inference_copy
from solov2.models.postprocess import flatten_raw, widen
from solov2.models.solov2 import SOLOv2
from solov2.ops.matrix_nms import decay_scores
from solov2.settings import PostprocessSettings

NUM_CELLS = 512  # images seldom have more cells above the category threshold


class ExportedSOLOv2(nn.Module):
    """The module that is exported: pixels in, instances or raw outputs out.

    Args:
        model: left unchanged; a copy with folded batch norms is exported, from the CPU, so that the file names no
            device and runs on any.
        raw: return the raw outputs of `SOLOv2.forward` instead of instances.
        num_cells: number of cells whose masks are computed, see `select_instances`.
        dtype: of the network, from its first convolution to its raw outputs. What comes before and after, up to the
            instances, computes in float32.

    Raises:
        InputError: `model.settings.max_candidates` is 0 (no limit), so the number of rows is not fixed.
    """

    def __init__(
        self, model: SOLOv2, *, raw: bool = False, num_cells: int = NUM_CELLS, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if not raw and not model.settings.max_candidates:
            raise InputError("an exported graph needs model.max_candidates of 1 or more")
        self.model = inference_copy(model).cpu()
        fold_batch_norms(self.model)
        for part in self.model.children() if dtype != torch.float32 else ():
            part.to(dtype)  # not the model itself: its pixel statistics stay float32
        self.raw, self.num_cells = raw, num_cells

    def forward(self, pixels: Tensor, sizes: Tensor) -> Mapping[str, Tensor | list[Tensor]]:
        """Instances of a batch.

        Args:
            pixels: uint8 [B, 3, H, W], RGB, padded at the bottom and right to multiples of 32.
            sizes: int64 [B, 2], (height, width) of each image inside.

        Returns:
            What `select_instances` returns, and of a panoptic model semantic: float [B, S + 1, H / 4, W / 4], the
            semantic logits on the padded input at stride 4; or the raw outputs.
        """
        raw = self.model(self.model.normalize(pixels, sizes))
        if self.raw:
            return raw
        semantic = {"semantic": widen(raw["semantic_logits"])} if "semantic_logits" in raw else {}
        return select_instances(raw, self.model.settings, num_cells=self.num_cells) | semantic


def select_instances(
    raw: dict[str, Any], settings: PostprocessSettings, *, num_cells: int = NUM_CELLS
) -> dict[str, Tensor]:
    """The instances that `solov2.models.postprocess.postprocess` finds, in tensors of fixed shape.

    They are the same as long as at most `num_cells` cells have a category score above `category_threshold`; if more do,
    those with the highest category scores are used. All masks of these cells are in memory at once: 3 x B x num_cells x
    H / 4 x W / 4 floats.

    Args:
        raw: outputs of `SOLOv2.forward`.
        settings: thresholds and limits; `max_candidates` must be at least 1.
        num_cells: n, number of cells whose masks are computed.

    Returns:
        scores: float [B, K], descending, 0 where the image has fewer instances; K is the smallest of
            max_instances (unless 0), max_candidates (unless 0) and n C.
        labels: int64 [B, K], meaningless where the score is 0, as are the masks.
        masks: float [B, K, H / 4, W / 4], probabilities on the padded input at stride 4.
    """
    scores, kernels, area_thresholds = flatten_raw(raw, settings)  # [B, cells, C], [B, cells, E], [cells]
    features = widen(raw["mask_features"])
    cells = scores.amax(2).topk(min(num_cells, scores.shape[1]), dim=1).indices  # [B, n]
    soft = (_gather_rows(kernels, cells).to(features.dtype) @ features.flatten(2)).sigmoid()  # [B, n, h w]
    masks = (soft > settings.mask_threshold).to(soft.dtype)
    areas = masks.sum(2)
    mask_scores = torch.where(areas > area_thresholds[cells], (soft * masks).sum(2) / areas.clamp(min=1), 0)
    scores = _gather_rows(scores, cells)  # [B, n, C]
    num_classes = scores.shape[2]
    scores = torch.where(scores > settings.category_threshold, scores * mask_scores[:, :, None], 0).flatten(1)
    scores, pairs = scores.topk(min(settings.max_candidates, scores.shape[1]), dim=1)
    slots, labels = pairs // num_classes, pairs % num_classes  # slots: which of the n cells
    shared = _gather_rows(_gather_rows(masks @ masks.mT, slots).mT, slots)  # symmetric
    scores = decay_scores(shared, labels, scores, kernel=settings.nms_kernel, sigma=settings.nms_sigma)
    scores = torch.where(scores >= settings.score_threshold, scores, 0)
    scores, order = scores.topk(min(settings.max_instances or scores.shape[1], scores.shape[1]), dim=1)
    soft = _gather_rows(soft, slots.gather(1, order))
    return {
        "scores": scores,
        "labels": labels.gather(1, order),
        "masks": soft.unflatten(2, features.shape[-2:]),
    }


def _gather_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Gather rows: values [B, n, m], row indices [B, k] -> [B, k, m]."""
    return values.gather(1, rows[:, :, None].expand(-1, -1, values.shape[2]))


def export_program(
    model: SOLOv2,
    size: tuple[int, int],
    *,
    raw: bool = False,
    num_cells: int = NUM_CELLS,
    dtype: torch.dtype = torch.float32,
) -> torch.export.ExportedProgram:
    """`ExportedSOLOv2` as one graph for one padded image size (height, width) and any batch size.

    Raises:
        InputError: height or width of `size` is not a positive multiple of 32; see also `ExportedSOLOv2`.
    """
    if any(side < model.divisor or side % model.divisor for side in size):
        raise InputError(f"size {size[0]} x {size[1]}: height and width must be multiples of {model.divisor}")
    module = ExportedSOLOv2(model, raw=raw, num_cells=num_cells, dtype=dtype).eval()
    pixels = torch.zeros(2, 3, *size, dtype=torch.uint8)  # a batch of 1 would be traced as a constant
    sizes = torch.tensor([size, size])
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    with torch.no_grad():
        return torch.export.export(module, (pixels, sizes), dynamic_shapes=(batch, batch))
