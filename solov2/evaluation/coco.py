"""COCO average precision of masks and boxes, equal to pycocotools' to the last digit.

It is computed by pycocotools or, on request, by faster-coco-eval, its rewrite in C++. The latter omits the 2e-16 that
pycocotools adds to a divisor, so its figures agree to 15 decimals.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from solov2.errors import InputError
from solov2.ops.masks import encode_rle

LOG = logging.getLogger(__name__)
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


BACKENDS = ("pycocotools", "faster-coco-eval")


class CocoEvaluator:
    """Collects results image by image and compares them with the ground truth of a COCO annotation file.

    Predictions are kept per image, so the figures depend neither on the order of the updates nor on how the images are
    distributed over ranks. Ranks exchange `predictions` and `merge` each other's.

    Args:
        coco: the ground truth. It is copied, because evaluation changes annotations in place.
        category_ids: the file's category id of each label 0..C-1.
        image_ids: the images to evaluate; None means all images of the file. An image without predictions counts as
            one without detections.
        backend: one of `BACKENDS`; faster-coco-eval needs the extra `fast`.

    Raises:
        InputError: an id is not in the annotation file, or the backend is not installed.
    """

    def __init__(
        self,
        coco: COCO,
        category_ids: Sequence[int],
        *,
        image_ids: Iterable[int] | None = None,
        backend: str = "pycocotools",
    ) -> None:
        self._ground_truth_class, self._evaluation_class = _backend_classes(backend)
        self.category_ids = [int(category) for category in category_ids]
        self.file_image_ids = set(coco.imgs)
        wanted = self.file_image_ids if image_ids is None else {int(image) for image in image_ids}
        self._require_known(wanted)
        unknown = sorted(set(self.category_ids) - set(coco.cats))
        if unknown:
            raise InputError(f"category id {unknown[0]} is not in the annotation file; pass only ids that are")
        self.coco = _copy_ground_truth(coco, wanted)
        self.predictions: dict[int, list[dict[str, Any]]] = {}
        """image id -> entries in COCO results format with `segmentation` and `bbox`; plain Python types."""

    def update(self, image_ids: Sequence[int], results: Sequence[Mapping[str, Any]]) -> None:
        """Add the results of some images; images that are not evaluated or already have results are skipped.

        Args:
            image_ids: one id per result.
            results: per image `scores` float32 [N], `labels` int64 [N], `boxes` float32 [N, 4] xyxy with the maximum
                exclusive, and `masks`, either bool [N, H, W] at the original size or a list of N RLE.

        Raises:
            InputError: an image id is not in the annotation file, or a label has no category.
        """
        self._require_known(image_ids)
        for image_id, result in zip(image_ids, results, strict=True):
            if int(image_id) in self.coco.imgs and int(image_id) not in self.predictions:
                self.predictions[int(image_id)] = self._to_coco(int(image_id), result)

    def merge(self, shares: Iterable[Mapping[int, list[dict[str, Any]]]]) -> None:
        """Add the `predictions` of several evaluators, possibly its own too; images already here are skipped."""
        for predictions in shares:
            self._require_known(predictions)
            for image_id, entries in predictions.items():
                if image_id in self.coco.imgs:
                    self.predictions.setdefault(image_id, entries)

    def results(self) -> list[dict[str, Any]]:
        """Instances in COCO results format, ready for JSON: image_id, category_id (of the file), segmentation, score.

        Images are in the order of the annotation file. There is no `bbox`: with it, pycocotools would use the area of
        the box instead of the mask's to sort instances into small, medium and large.
        """
        return [_without(entry, "bbox") for entry in self._in_file_order()]

    def box_results(self) -> list[dict[str, Any]]:
        """The same instances as boxes: image_id, category_id, bbox (x, y, width, height), score."""
        return [_without(entry, "segmentation") for entry in self._in_file_order()]

    def summarize(self, *, per_class: bool = False) -> dict[str, dict[str, Any]]:
        """Compute the twelve COCO figures (`FIGURES`, fractions of 1) for masks and for boxes.

        A figure without any ground truth is -1, as in pycocotools; without predictions it is 0.

        Args:
            per_class: add the AP of each class.

        Returns:
            {"segm": {figure: value}, "bbox": {figure: value}} and, if asked for,
            "per_class": {class name: {"segm_AP": value, "bbox_AP": value}}.
        """
        evaluations = {kind: self._evaluate(found, kind) for kind, found in self._results_by_type().items()}
        summary: dict[str, dict[str, Any]] = {
            kind: dict(zip(FIGURES, map(float, evaluation.stats), strict=True))
            for kind, evaluation in evaluations.items()
        }
        if per_class:
            class_aps = {kind: _class_aps(evaluation) for kind, evaluation in evaluations.items()}
            summary["per_class"] = {
                self.coco.cats[category]["name"]: {f"{kind}_AP": aps[category] for kind, aps in class_aps.items()}
                for category in sorted(self.coco.cats)
            }
        return summary

    def _results_by_type(self) -> dict[str, list[dict[str, Any]]]:
        return {"segm": self.results(), "bbox": self.box_results()}

    def _evaluate(self, found: list[dict[str, Any]], kind: str) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = _coco_from(self.coco.dataset, self._ground_truth_class)
            # loadRes inspects the first result to find out the type, so it fails if there is none.
            empty = {**self.coco.dataset, "annotations": []}
            detections = truth.loadRes(found) if found else _coco_from(empty, self._ground_truth_class)
            evaluation = self._evaluation_class(truth, detections, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def _in_file_order(self) -> Iterable[dict[str, Any]]:
        return (entry for image_id in self.coco.imgs for entry in self.predictions.get(image_id, ()))

    def _to_coco(self, image_id: int, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        masks = encode_rle(result["masks"]) if isinstance(result["masks"], Tensor) else result["masks"]
        labels, scores, boxes = (result[key].tolist() for key in ("labels", "scores", "boxes"))
        entries = []
        for label, score, (x0, y0, x1, y1), mask in zip(labels, scores, boxes, masks, strict=True):
            if not 0 <= label < len(self.category_ids):
                raise InputError(
                    f"label {label} of image {image_id} has no category: the annotation file has "
                    f"{len(self.category_ids)} classes; evaluate a model with the same classes"
                )
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": self.category_ids[label],
                    "segmentation": _json_rle(mask),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": score,
                }
            )
        return entries

    def _require_known(self, image_ids: Iterable[int]) -> None:
        unknown = sorted({int(image) for image in image_ids} - self.file_image_ids)
        if unknown:
            raise InputError(f"image id {unknown[0]} is not in the annotation file; evaluate only images that are")


def format_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary as a text table: figures in percent, "-" without ground truth."""
    lines = ["".join(f"{title:>11}" for title in ("", "mask", "box"))]
    lines += [_row(figure, summary["segm"][figure], summary["bbox"][figure], 11) for figure in FIGURES]
    classes = summary.get("per_class", {})
    if classes:
        width = max(11, *(len(name) + 1 for name in classes))
        lines += ["", f"{'class':>{width}}{'mask AP':>11}{'box AP':>11}"]
        lines += [_row(name, aps["segm_AP"], aps["bbox_AP"], width) for name, aps in classes.items()]
    return "\n".join(lines)


def _row(title: str, mask: float, box: float, width: int) -> str:
    return f"{title:>{width}}{percent(mask):>11}{percent(box):>11}"


def percent(value: float) -> str:
    """AP or AR, a fraction, as it is printed: "37.5"; "-" for the -1 that means no ground truth."""
    return "-" if value < 0 else f"{100 * value:.1f}"


def _backend_classes(backend: str) -> tuple[type, type]:
    """The classes (ground truth, evaluation): `COCO` and `COCOeval` of pycocotools, or their counterparts."""
    if backend not in BACKENDS:
        raise InputError(f"unknown evaluation backend {backend}; choose one of {', '.join(BACKENDS)}")
    if backend == "pycocotools":
        return COCO, COCOeval
    try:
        import faster_coco_eval
    except ImportError as error:
        raise InputError("faster-coco-eval is not installed: pip install 'solov2[fast]'") from error
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def _class_aps(evaluation: Any) -> dict[int, float]:
    """Category id -> AP, a fraction of 1; -1 without ground truth."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]; all areas, 100 per image
    aps = {}
    for index, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, index]
        values = values[values > -1]
        aps[int(category)] = float(np.mean(values)) if values.size else -1.0
    return aps


def _copy_ground_truth(coco: COCO, image_ids: set[int]) -> COCO:
    """A copy for some images, with the keys that pycocotools requires."""
    annotations = [
        _with_required_keys(coco, annotation)
        for annotation in coco.dataset.get("annotations", [])
        if annotation["image_id"] in image_ids
    ]
    if any(annotation["id"] == 0 for annotation in annotations):
        LOG.warning(
            "annotation id 0: pycocotools mistakes it for 'no match' and counts that instance as missed; number "
            "annotations from 1"
        )
    images = [image for image in coco.dataset["images"] if image["id"] in image_ids]
    return _coco_from({"images": images, "annotations": annotations, "categories": coco.dataset["categories"]})


def _with_required_keys(coco: COCO, annotation: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an annotation with the keys that pycocotools requires and hand-made files often lack."""
    complete = {"iscrowd": 0, **annotation}
    if "area" not in complete or "bbox" not in complete:
        rle = coco.annToRLE(complete)
        complete.setdefault("area", float(mask_api.area(rle)))
        complete.setdefault("bbox", mask_api.toBbox(rle).tolist())
    return complete


def _coco_from(dataset: dict[str, Any], kind: type = COCO) -> Any:
    coco = kind()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _json_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    size, counts = rle["size"], rle["counts"]
    return {"size": [int(side) for side in size], "counts": counts if isinstance(counts, str) else counts.decode()}


def _without(entry: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != key}
