"""Precision and recall, class by class, by pycocotools or by faster-coco-eval, its rewrite in C++.

The latter omits the 2e-16 that pycocotools adds to a divisor, so its figures agree to 15 decimals. Only it has two
measures that are asked for by name:

- `boundary`: the IoU of two masks is the smaller one of theirs and that of their boundaries, the pixels within 2% of
  the image's diagonal of the outline (Boundary IoU, Cheng et al., arXiv 2103.16562), except with crowds. In an image
  more than 25 times as long as wide, where that is half of the width, faster-coco-eval 1.8 gets the boundaries wrong.
- the rules of LVIS, see `solov2.evaluation.lvis`.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solov2.errors import InputError

LOG = logging.getLogger(__name__)
FASTER = "faster-coco-eval"
BACKENDS = ("pycocotools", FASTER)
FIGURES = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)


class Backend(NamedTuple):
    """What evaluates: `COCO` and `COCOeval` of pycocotools, or their counterparts."""

    ground_truth: Callable[[], Any]
    evaluation: Callable[..., Any]  # of ground truth, predictions and kind


class Curves(NamedTuple):
    """Of a class; -1 without ground truth."""

    precision: np.ndarray  # float64 [10 IoU, 101 recall, 4 ranges of areas], with the highest limit
    recall: np.ndarray  # float64 [10 IoU, 4 ranges of areas, 3 limits]


class Found(Protocol):
    """Predictions for the images of an annotation file, of a model or from a file."""

    def by_category(self, most: int | None = None) -> dict[int, list[tuple[int, int]]]:
        """Category id -> (image id, number) of its predictions, in the order of the images and of the file.

        `most`: how many of each image, all classes together, those with the highest scores; None means all.
        """

    def entries(self, kind: str, rows: Iterable[tuple[int, int]]) -> Iterable[dict[str, Any]]:
        """Predictions in COCO's results format, to be compared as "segm", "bbox" or "boundary"; new dictionaries."""


class GroundTruth:
    """The annotations of a COCO annotation file, by class.

    Args:
        coco: the file, which is not changed.
        image_ids: the images to evaluate.
        category_ids: the classes to evaluate; None means all.

    Attributes:
        images: id -> entry of the file, in its order.
        categories: the same, in the order of the ids.
    """

    def __init__(self, coco: COCO, image_ids: set[int], category_ids: Iterable[int] | None = None) -> None:
        self._coco = coco
        self.images: dict[int, dict[str, Any]] = {i: image for i, image in coco.imgs.items() if i in image_ids}
        wanted = set(coco.cats if category_ids is None else category_ids)
        self.categories: dict[int, dict[str, Any]] = {i: coco.cats[i] for i in sorted(coco.cats) if i in wanted}
        self._annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in coco.dataset.get("annotations", []):
            if annotation["image_id"] in image_ids:
                self._annotations[annotation["category_id"]].append(annotation)
        if any(annotation["id"] == 0 for each in self._annotations.values() for annotation in each):
            LOG.warning(
                "annotation id 0: pycocotools mistakes it for 'no match' and counts that instance as missed; number "
                "annotations from 1"
            )

    def image_ids(self, category: int) -> set[int]:
        """The images with an annotation of a class."""
        return {annotation["image_id"] for annotation in self._annotations.get(category, ())}

    def annotations(self, category: int) -> list[dict[str, Any]]:
        """The annotations of a class, with the keys that pycocotools requires and hand-made files often lack."""
        return [self._with_required_keys(annotation) for annotation in self._annotations.get(category, ())]

    def _with_required_keys(self, annotation: Mapping[str, Any]) -> dict[str, Any]:
        complete = {"iscrowd": 0, **annotation}
        if "area" not in complete or "bbox" not in complete:
            rle = self._coco.annToRLE(complete)
            complete.setdefault("area", float(mask_api.area(rle)))
            complete.setdefault("bbox", mask_api.toBbox(rle).tolist())
        return complete


def load_backend(name: str) -> Backend:
    """The classes of one of `BACKENDS`.

    Raises:
        InputError: there is no such backend, or it is not installed.
    """
    if name not in BACKENDS:
        raise InputError(f"unknown evaluation backend {name}; choose one of {', '.join(BACKENDS)}")
    if name != FASTER:
        return Backend(COCO, COCOeval)
    try:
        import faster_coco_eval
    except ImportError as error:
        raise InputError("faster-coco-eval is not installed: pip install 'solov2[fast]'") from error
    return Backend(faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)


def class_curves(
    truth: GroundTruth,
    found: Found,
    rows: Mapping[int, list[tuple[int, int]]],
    backends: Mapping[str, Backend],
    *,
    max_detections: int,
) -> dict[str, list[Curves]]:
    """The curves of each class, in the order of the categories.

    Args:
        truth: what to compare with.
        found: the predictions.
        rows: those that count, by category, as `found.by_category()` gives them.
        backends: what evaluates each kind.
        max_detections: how many predictions count per image and class, those with the highest scores.

    Returns:
        {kind: curves of all classes}, for the kinds of `backends`.
    """
    curves: dict[str, list[Curves]] = {kind: [] for kind in backends}
    # Class by class, because pycocotools keeps Python objects for every image, class and range of areas.
    for category in truth.categories:
        annotations, own = truth.annotations(category), rows.get(category, ())
        for kind, backend in backends.items():
            entries = list(found.entries(kind, own)) if annotations else []
            curves[kind].append(_curves(kind, truth, category, annotations, entries, backend, max_detections))
    return curves


def _curves(
    kind: str,
    truth: GroundTruth,
    category: int,
    annotations: list[dict[str, Any]],
    found: list[dict[str, Any]],
    backend: Backend,
    max_detections: int,
) -> Curves:
    """The curves of a class; in a function of its own, so that the rest is freed."""
    if not annotations:
        return Curves(-np.ones((10, 101, 4)), -np.ones((10, 4, 3)))
    used = {entry["image_id"] for entry in (*found, *annotations)}
    dataset = {
        "info": {},
        "images": [image for image_id, image in truth.images.items() if image_id in used],
        "categories": [truth.categories[category]],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        # Copies of the annotations, because pycocotools turns their polygons into RLE.
        known = _indexed({**dataset, "annotations": [dict(entry) for entry in annotations]}, backend)
        # loadRes inspects the first result to find out the type, so it fails if there is none.
        detections = known.loadRes(found) if found else _indexed({**dataset, "annotations": []}, backend)
        evaluation = backend.evaluation(known, detections, kind)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return Curves(evaluation.eval["precision"][:, :, 0, :, -1].copy(), evaluation.eval["recall"][:, 0].copy())


def _indexed(dataset: dict[str, Any], backend: Backend) -> Any:
    coco = backend.ground_truth()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def coco_figures(curves: Sequence[Curves], max_detections: int) -> dict[str, float]:
    """The twelve figures (`FIGURES`) of all classes, fractions of 1, as pycocotools' `summarize` computes them at 100.

    With more `max_detections`, AR100 has their number in its name.
    """
    precision = np.stack([each.precision for each in curves], axis=2)  # [IoU, recall, class, area]
    recall = np.stack([each.recall for each in curves], axis=1)  # [IoU, class, area, limit]
    values = (
        *(precision[..., 0], precision[:1, ..., 0], precision[5:6, ..., 0]),  # IoU 0.5 to 0.95, 0.5, 0.75
        *(precision[..., area] for area in (1, 2, 3)),
        *(recall[:, :, 0, limit] for limit in (0, 1, 2)),
        *(recall[:, :, area, -1] for area in (1, 2, 3)),
    )
    names = [f"AR{max_detections}" if figure == "AR100" else figure for figure in FIGURES]
    return dict(zip(names, map(mean, values), strict=True))


def mean_precision(curves: Sequence[Curves]) -> float:
    """The AP of some classes, at all areas; -1 without ground truth."""
    return mean(np.stack([each.precision[:, :, 0] for each in curves], axis=2)) if curves else -1.0


def mean(values: np.ndarray) -> float:
    """Mean of the entries with ground truth; -1 if there are none."""
    values = values[values > -1]
    return float(np.mean(values)) if values.size else -1.0
