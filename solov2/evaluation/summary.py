"""The evaluator of a dataset, and what is read off its summary: of instances or panoptic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from solov2.data.coco import CocoInstances
from solov2.data.image_dataset import ImageDataset
from solov2.data.panoptic import CocoPanoptic
from solov2.evaluation import coco, panoptic
from solov2.evaluation.coco import CocoEvaluator
from solov2.evaluation.lvis import require_lvis
from solov2.evaluation.panoptic import GROUPS, PanopticEvaluator


def build_evaluator(
    dataset: ImageDataset,
    category_ids: Sequence[int | None],
    stuff_category_ids: Sequence[int | None],
    *,
    max_detections: int,
    backend: str = "pycocotools",
    boundary: bool = False,
    lvis: bool = False,
) -> CocoEvaluator | PanopticEvaluator:
    """The evaluator of COCO AP, or of panoptic quality for panoptic annotations.

    Args:
        dataset: what to compare with.
        category_ids, stuff_category_ids: the file's category id of each label of the model, None for a class that it
            lacks.
        max_detections, backend, boundary, lvis: of `CocoEvaluator`.

    Raises:
        InputError: a backend is not installed, or the annotation file lacks a key of LVIS.
    """
    if isinstance(dataset, CocoPanoptic):
        return PanopticEvaluator(dataset.panoptic, category_ids, stuff_category_ids)
    assert isinstance(dataset, CocoInstances)
    if lvis:
        require_lvis(dataset.coco, dataset.annotation_file)
    return CocoEvaluator(
        dataset.coco, category_ids, backend=backend, max_detections=max_detections, boundary=boundary, lvis=lvis
    )


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary as a text table: figures in percent, "-" without ground truth."""
    return panoptic.format_table(summary) if _is_panoptic(summary) else coco.format_table(summary)


def flatten(summary: Mapping[str, Any]) -> dict[str, float]:
    """{"segm_AP": ..., "bbox_AP50": ...}, or {"all_pq": ..., "stuff_rq": ...} without the figures that do not exist."""
    groups = tuple(GROUPS) if _is_panoptic(summary) else ("segm", "bbox")
    figures = {f"{group}_{name}": value for group in groups for name, value in summary[group].items()}
    return {name: value for name, value in figures.items() if value is not None}


def main_figure(summary: Mapping[str, Any]) -> float:
    """The figure that chooses the best checkpoint, a fraction of 1: mask AP, or the PQ of all classes; -1 for none."""
    if not _is_panoptic(summary):
        return summary["segm"]["AP"]
    return -1.0 if summary["all"]["pq"] is None else summary["all"]["pq"]


def headline(summary: Mapping[str, Any]) -> str:
    """The main figures in a few words: mask and box AP, or PQ."""
    if _is_panoptic(summary):
        quality, things, stuff = (panoptic.percent(summary[group]["pq"]) for group in GROUPS)
        return f"PQ {quality}  things {things}  stuff {stuff}"
    return f"mask AP {coco.percent(summary['segm']['AP'])}  box AP {coco.percent(summary['bbox']['AP'])}"


def _is_panoptic(summary: Mapping[str, Any]) -> bool:
    return "stuff" in summary
