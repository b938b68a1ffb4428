"""COCO average precision of masks and boxes, equal to pycocotools' to the last digit.

It is computed by pycocotools or, on request, by faster-coco-eval, its rewrite in C++. The latter omits the 2e-16 that
pycocotools adds to a divisor, so its figures agree to 15 decimals.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from solov2.data.class_matching import distinct_names
from solov2.errors import InputError, count, printable
from solov2.ops.masks import encode_rle

LOG = logging.getLogger(__name__)
MAX_DETECTIONS = 100  # COCO's limit per image and class
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


class Predictions(NamedTuple):
    """The predictions of an image; as one dictionary per instance, they would take three times the memory."""

    categories: np.ndarray  # int64 [N], category ids of the file
    scores: np.ndarray  # float32 [N]
    boxes: np.ndarray  # float32 [N, 4], xyxy with the maximum exclusive
    masks: list[str]  # N, the counts of compressed RLE
    size: list[int]  # [h, w] of the masks


class CocoEvaluator:
    """Collects results image by image and compares them with the ground truth of a COCO annotation file.

    Predictions are kept per image, so the figures depend neither on the order of the updates nor on how the images are
    distributed over ranks. Ranks exchange `predictions` and `merge` each other's.

    Args:
        coco: the ground truth, which is not changed.
        category_ids: the file's category id of each label 0..C-1; None for a class that the file lacks, whose
            predictions are dropped. A category that is not listed counts with AP 0.
        image_ids: the images to evaluate; None means all images of the file. An image without predictions counts as
            one without detections.
        backend: one of `BACKENDS`; faster-coco-eval needs the extra `fast`.
        max_detections: how many predictions count per image and class, those with the highest scores, at least 100.
            At 100 the figures are COCO's.

    Raises:
        InputError: an id is not in the annotation file, or the backend is not installed.
    """

    def __init__(
        self,
        coco: COCO,
        category_ids: Sequence[int | None],
        *,
        image_ids: Iterable[int] | None = None,
        backend: str = "pycocotools",
        max_detections: int = MAX_DETECTIONS,
    ) -> None:
        self._ground_truth_class, self._evaluation_class = _backend_classes(backend)
        self.max_detections = max_detections
        self.category_ids = [None if category is None else int(category) for category in category_ids]
        self.file_image_ids = set(coco.imgs)
        wanted = self.file_image_ids if image_ids is None else {int(image) for image in image_ids}
        self._require_known(wanted)
        unknown = sorted({category for category in self.category_ids if category is not None} - set(coco.cats))
        if unknown:
            raise InputError(f"category id {unknown[0]} is not in the annotation file; pass only ids that are")
        self._coco = coco
        self.images: dict[int, dict[str, Any]] = {i: image for i, image in coco.imgs.items() if i in wanted}
        """The images to evaluate, in the order of the file: id -> entry of the file."""
        self._truth = _by_category(coco, wanted)
        self.predictions: dict[int, Predictions] = {}
        """By image id."""

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
            if int(image_id) in self.images and int(image_id) not in self.predictions:
                self.predictions[int(image_id)] = self._pack(int(image_id), result)

    def merge(self, shares: Iterable[Mapping[int, Predictions]]) -> None:
        """Add the `predictions` of several evaluators, possibly its own too; images already here are skipped."""
        for predictions in shares:
            self._require_known(predictions)
            for image_id, found in predictions.items():
                if image_id in self.images:
                    self.predictions.setdefault(image_id, found)

    def results(self) -> list[dict[str, Any]]:
        """Instances in COCO results format, ready for JSON: image_id, category_id, segmentation, score.

        Images are in the order of the annotation file, ids are those of the file. There is no `bbox`: with it,
        pycocotools would use the area of the box instead of the mask's to sort instances into small, medium and large.
        """
        return list(self._entries("segm", self._in_file_order()))

    def box_results(self) -> list[dict[str, Any]]:
        """The same instances as boxes: image_id, category_id, bbox (x, y, width, height), score."""
        return list(self._entries("bbox", self._in_file_order()))

    def summarize(self, *, per_class: bool = False) -> dict[str, Any]:
        """Compute the twelve COCO figures (`FIGURES`, fractions of 1) for masks and for boxes.

        A figure without any ground truth is -1, as in pycocotools; without predictions it is 0. With a higher
        `max_detections`, all figures but AR1 and AR10 count that many, and AR100 is called AR300 (for example).

        Args:
            per_class: add the AP of each class.

        Returns:
            {"max_detections": int, "segm": {figure: value}, "bbox": {figure: value}} and, if asked for,
            "per_class": {class name: {"segm_AP": value, "bbox_AP": value}}.
        """
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for image_id, row in self._in_file_order():
            found[int(self.predictions[image_id].categories[row])].append((image_id, row))
        categories = sorted(self._coco.cats)
        # Class by class, because pycocotools keeps Python objects for every image, class and range of areas.
        curves = [self._evaluate(category, found.pop(category, [])) for category in categories]
        summary: dict[str, Any] = {"max_detections": self.max_detections}
        for kind in ("segm", "bbox"):
            summary[kind] = _figures([curve[kind] for curve in curves], self.max_detections)
        if per_class:
            names = distinct_names([self._coco.cats[category]["name"] for category in categories])
            summary["per_class"] = {
                name: {f"{kind}_AP": _mean(precision[:, :, 0]) for kind, (precision, _) in curve.items()}
                for name, curve in zip(names, curves, strict=True)
            }
        return summary

    def _evaluate(self, category: int, rows: Sequence[tuple[int, int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The curves of a class, for masks and boxes.

        Returns:
            {kind: (precision float64 [10 IoU, 101 recall, 4 ranges of areas], of `max_detections`;
            recall float64 [10 IoU, 4 ranges of areas, 3 limits])}, -1 without ground truth.
        """
        # Copies, because pycocotools turns their polygons into RLE.
        truth = [_with_required_keys(self._coco, annotation) for annotation in self._truth.get(category, ())]
        if not truth:
            nothing = -np.ones((10, 101, 4)), -np.ones((10, 4, 3))
            return {"segm": nothing, "bbox": nothing}
        used = {image_id for image_id, _ in rows} | {annotation["image_id"] for annotation in truth}
        dataset = {
            "info": {},
            "images": [image for image_id, image in self.images.items() if image_id in used],
            "categories": [self._coco.cats[category]],
        }
        return {kind: self._curves(kind, {**dataset, "annotations": truth}, rows) for kind in ("segm", "bbox")}

    def _curves(
        self, kind: str, dataset: dict[str, Any], rows: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(precision, recall) of a dataset with a single class; in a function of its own, so that the rest is freed."""
        found = list(self._entries(kind, rows))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = _coco_from(dataset, self._ground_truth_class)
            # loadRes inspects the first result to find out the type, so it fails if there is none.
            empty = {**dataset, "annotations": []}
            detections = truth.loadRes(found) if found else _coco_from(empty, self._ground_truth_class)
            evaluation = self._evaluation_class(truth, detections, kind)
            evaluation.params.maxDets = [1, 10, self.max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval["precision"][:, :, 0, :, -1].copy(), evaluation.eval["recall"][:, 0].copy()

    def _in_file_order(self) -> Iterator[tuple[int, int]]:
        """Yield (image id, row of its `predictions`)."""
        for image_id in self.images:
            if image_id in self.predictions:
                yield from ((image_id, row) for row in range(len(self.predictions[image_id].masks)))

    def _entries(self, kind: str, rows: Iterable[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Yield these predictions in COCO results format, in plain Python types."""
        for image_id, row in rows:
            found = self.predictions[image_id]
            x0, y0, x1, y1 = found.boxes[row].tolist()
            yield {
                "image_id": image_id,
                "category_id": int(found.categories[row]),
                **(
                    {"segmentation": {"size": found.size, "counts": found.masks[row]}}
                    if kind == "segm"
                    else {"bbox": [x0, y0, x1 - x0, y1 - y0]}
                ),
                "score": float(found.scores[row]),
            }

    def _pack(self, image_id: int, result: Mapping[str, Any]) -> Predictions:
        masks = encode_rle(result["masks"]) if isinstance(result["masks"], Tensor) else result["masks"]
        labels = result["labels"].tolist()
        wrong = next((label for label in labels if not 0 <= label < len(self.category_ids)), None)
        if wrong is not None:
            raise InputError(
                f"label {wrong} of image {image_id} has no category: the annotation file has "
                f"{len(self.category_ids)} classes; evaluate a model with the same classes"
            )
        kept = [row for row, label in enumerate(labels) if self.category_ids[label] is not None]
        counts = [masks[row]["counts"] for row in kept]
        return Predictions(
            categories=np.array([self.category_ids[labels[row]] for row in kept], dtype=np.int64),
            scores=result["scores"].cpu().numpy()[kept],  # indexed by a list, so copied
            boxes=result["boxes"].cpu().numpy()[kept],
            masks=[each if isinstance(each, str) else each.decode() for each in counts],
            size=[int(side) for side in masks[kept[0]]["size"]] if kept else [],
        )

    def _require_known(self, image_ids: Iterable[int]) -> None:
        unknown = sorted({int(image) for image in image_ids} - self.file_image_ids)
        if unknown:
            raise InputError(f"image id {unknown[0]} is not in the annotation file; evaluate only images that are")


def limit_warning(coco: COCO, max_detections: int, max_instances: int) -> str | None:
    """A warning that names images with more instances than an evaluation can count, which lowers AP; None without.

    Args:
        coco: the ground truth.
        max_detections: of the evaluator, per image and class.
        max_instances: of the model, per image; 0: no limit.
    """
    exceeded: dict[int, int] = {}  # image id -> its instances
    for image_id in coco.imgs:
        classes = Counter(a["category_id"] for a in coco.imgToAnns.get(image_id, ()) if not a.get("iscrowd"))
        total = sum(number for category, number in classes.items() if category in coco.cats)
        if max(classes.values(), default=0) > max_detections or 0 < max_instances < total:
            exceeded[image_id] = total
    if not exceeded:
        return None
    largest = sorted(exceeded, key=lambda image_id: -exceeded[image_id])
    names = [f"{coco.imgs[i].get('file_name', i)} ({exceeded[i]:,})" for i in largest]
    names = [*names[:5], "..."] if len(names) > 5 else names
    return printable(
        f"evaluation cannot count all instances of {count(len(exceeded), 'image')}, which lowers AP: "
        f"{', '.join(names)}; data.max_detections is {max_detections} (per class) and model.max_instances "
        f"{max_instances}: set both to {exceeded[largest[0]]} or more"
    )


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary as a text table: figures in percent, "-" without ground truth."""
    lines = ["".join(f"{title:>11}" for title in ("", "mask", "box"))]
    if summary["max_detections"] != MAX_DETECTIONS:
        lines.insert(0, f"up to {summary['max_detections']} detections per image and class (COCO: {MAX_DETECTIONS})")
    lines += [_row(figure, value, summary["bbox"][figure], 11) for figure, value in summary["segm"].items()]
    classes = {printable(name): aps for name, aps in summary.get("per_class", {}).items()}
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


def _figures(curves: Sequence[tuple[np.ndarray, np.ndarray]], max_detections: int) -> dict[str, float]:
    """The twelve figures from the curves of all classes, as pycocotools' `summarize` computes them at 100."""
    precision = np.stack([precision for precision, _ in curves], axis=2)  # [IoU, recall, class, area]
    recall = np.stack([recall for _, recall in curves], axis=1)  # [IoU, class, area, limit]
    values = (
        *(precision[..., 0], precision[:1, ..., 0], precision[5:6, ..., 0]),  # IoU 0.5 to 0.95, 0.5, 0.75
        *(precision[..., area] for area in (1, 2, 3)),
        *(recall[:, :, 0, limit] for limit in (0, 1, 2)),
        *(recall[:, :, area, -1] for area in (1, 2, 3)),
    )
    names = [f"AR{max_detections}" if figure == "AR100" else figure for figure in FIGURES]
    return dict(zip(names, map(_mean, values), strict=True))


def _mean(values: np.ndarray) -> float:
    """Mean of the entries with ground truth; -1 if there are none."""
    values = values[values > -1]
    return float(np.mean(values)) if values.size else -1.0


def _by_category(coco: COCO, image_ids: set[int]) -> dict[int, list[dict[str, Any]]]:
    """Category id -> its annotations in some images, as they are in the file."""
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in coco.dataset.get("annotations", []):
        if annotation["image_id"] in image_ids:
            annotations[annotation["category_id"]].append(annotation)
    if any(annotation["id"] == 0 for each in annotations.values() for annotation in each):
        LOG.warning(
            "annotation id 0: pycocotools mistakes it for 'no match' and counts that instance as missed; number "
            "annotations from 1"
        )
    return annotations


def _with_required_keys(coco: COCO, annotation: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an annotation with the keys that pycocotools requires and hand-made files often lack."""
    complete = {"iscrowd": 0, **annotation}
    if "area" not in complete or "bbox" not in complete:
        rle = coco.annToRLE(complete)
        complete.setdefault("area", float(mask_api.area(rle)))
        complete.setdefault("bbox", mask_api.toBbox(rle).tolist())
    return complete


def _coco_from(dataset: dict[str, Any], kind: type) -> Any:
    coco = kind()
    coco.dataset = dataset
    coco.createIndex()
    return coco
