"""COCO average precision of masks and boxes, equal to pycocotools' to the last digit.

On request also that of boundaries, and all of it by the rules of LVIS.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from torch import Tensor

from solov2.data.class_matching import distinct_names
from solov2.errors import InputError, count, printable
from solov2.evaluation.curves import (
    FASTER,
    Curves,
    Found,
    GroundTruth,
    class_curves,
    coco_figures,
    load_backend,
    mean_precision,
)
from solov2.evaluation.lvis import LVIS_DETECTIONS, highest, lvis_curves, lvis_figures, require_lvis
from solov2.ops.masks import encode_rle

MAX_DETECTIONS = 100  # COCO's limit per image and class
TITLES = {"segm": "mask", "bbox": "box", "boundary": "boundary"}  # of the kinds of figures, in tables


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
        backend: one of `solov2.evaluation.curves.BACKENDS`; faster-coco-eval needs the extra `fast`.
        max_detections: how many predictions count per image and class, those with the highest scores, at least 100.
            At 100 the figures are COCO's.
        boundary: also compute the figures of boundaries, with faster-coco-eval.
        lvis: also compute figures by the rules of LVIS, with faster-coco-eval.

    Attributes:
        predictions: by image id.

    Raises:
        InputError: an id is not in the annotation file, a backend is not installed, or the file lacks a key of LVIS.
    """

    def __init__(
        self,
        coco: COCO,
        category_ids: Sequence[int | None],
        *,
        image_ids: Iterable[int] | None = None,
        backend: str = "pycocotools",
        max_detections: int = MAX_DETECTIONS,
        boundary: bool = False,
        lvis: bool = False,
    ) -> None:
        for name in (backend, FASTER) if boundary or lvis else (backend,):
            load_backend(name)  # now, not after all predictions
        if lvis:
            require_lvis(coco, "the annotation file")
        self._backend, self._boundary, self._lvis = backend, boundary, lvis
        self.max_detections = max_detections
        self.category_ids = [None if category is None else int(category) for category in category_ids]
        self.file_image_ids = set(coco.imgs)
        wanted = self.file_image_ids if image_ids is None else {int(image) for image in image_ids}
        self._require_known(wanted)
        unknown = sorted({category for category in self.category_ids if category is not None} - set(coco.cats))
        if unknown:
            raise InputError(f"category id {unknown[0]} is not in the annotation file; pass only ids that are")
        self.truth = GroundTruth(coco, wanted)
        self.predictions: dict[int, Predictions] = {}

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
            if int(image_id) in self.truth.images and int(image_id) not in self.predictions:
                self.predictions[int(image_id)] = self._pack(int(image_id), result)

    def merge(self, shares: Iterable[Mapping[int, Predictions]]) -> None:
        """Add the `predictions` of several evaluators, possibly its own too; images already here are skipped."""
        for predictions in shares:
            self._require_known(predictions)
            for image_id, found in predictions.items():
                if image_id in self.truth.images:
                    self.predictions.setdefault(image_id, found)

    def results(self) -> list[dict[str, Any]]:
        """Instances in COCO results format, ready for JSON: image_id, category_id, segmentation, score.

        Images are in the order of the annotation file, ids are those of the file. There is no `bbox`: with it,
        pycocotools would use the area of the box instead of the mask's to sort instances into small, medium and large.
        """
        return list(self.entries("segm", self._in_file_order()))

    def box_results(self) -> list[dict[str, Any]]:
        """The same instances as boxes: image_id, category_id, bbox (x, y, width, height), score."""
        return list(self.entries("bbox", self._in_file_order()))

    def summarize(self, *, per_class: bool = False) -> dict[str, Any]:
        """Compute the figures, see `summarize`."""
        return summarize(
            self.truth,
            self,
            backend=self._backend,
            max_detections=self.max_detections,
            boundary=self._boundary,
            lvis=self._lvis,
            per_class=per_class,
        )

    def by_category(self, most: int | None = None) -> dict[int, list[tuple[int, int]]]:
        """Category id -> (image id, row of its `predictions`), see `solov2.evaluation.curves.Found`."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for image_id, row in self._in_file_order(most):
            found[int(self.predictions[image_id].categories[row])].append((image_id, row))
        return found

    def _in_file_order(self, most: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (image id, row of its `predictions`); at `most` so many per image."""
        for image_id in self.truth.images:
            if image_id in self.predictions:
                yield from ((image_id, row) for row in highest(self.predictions[image_id].scores, most).tolist())

    def entries(self, kind: str, rows: Iterable[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Yield these predictions in COCO results format, in plain Python types: masks, or boxes for "bbox"."""
        for image_id, row in rows:
            found = self.predictions[image_id]
            x0, y0, x1, y1 = found.boxes[row].tolist()
            yield {
                "image_id": image_id,
                "category_id": int(found.categories[row]),
                **(
                    {"bbox": [x0, y0, x1 - x0, y1 - y0]}
                    if kind == "bbox"
                    else {"segmentation": {"size": found.size, "counts": found.masks[row]}}
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


def summarize(
    truth: GroundTruth,
    found: Found,
    *,
    backend: str = "pycocotools",
    max_detections: int = MAX_DETECTIONS,
    boundary: bool = False,
    lvis: bool = False,
    per_class: bool = False,
) -> dict[str, Any]:
    """Compute the twelve COCO figures (`FIGURES`, fractions of 1) for masks and for boxes.

    A figure without any ground truth is -1, as in pycocotools; without predictions it is 0. With a higher
    `max_detections`, all figures but AR1 and AR10 count that many, and AR100 is called AR300 (for example).

    Args:
        truth, found: what to compare.
        backend, max_detections, boundary, lvis: as for `CocoEvaluator`.
        per_class: add the AP of each class.

    Returns:
        {"max_detections": int, "segm": {figure: value}, "bbox": {figure: value}} and, if asked for,
        "boundary": {figure: value}; "per_class": {class name: {"segm_AP": value, "bbox_AP": value}}, "boundary_AP" too;
        "lvis": all of these again by the rules of LVIS, with its figures (`solov2.evaluation.lvis.lvis_figures`).

    Raises:
        InputError: a backend is not installed.
    """
    backends = dict.fromkeys(("segm", "bbox"), load_backend(backend))
    if boundary:
        backends["boundary"] = load_backend(FASTER)
    names = distinct_names([category["name"] for category in truth.categories.values()]) if per_class else []
    curves = class_curves(truth, found, found.by_category(), backends, max_detections=max_detections)
    summary: dict[str, Any] = {
        "max_detections": max_detections,
        **{kind: coco_figures(each, max_detections) for kind, each in curves.items()},
        **_per_class(names, curves),
    }
    if lvis:
        curves, categories = lvis_curves(truth, found, backends), [*truth.categories.values()]
        summary["lvis"] = {
            "max_detections": LVIS_DETECTIONS,
            **{kind: lvis_figures(categories, each) for kind, each in curves.items()},
            **_per_class(names, curves),
        }
    return summary


def _per_class(names: Sequence[str], curves: Mapping[str, Sequence[Curves]]) -> dict[str, Any]:
    """The AP of each class, if they have `names`."""
    figures = {
        name: {f"{kind}_AP": mean_precision([each[position]]) for kind, each in curves.items()}
        for position, name in enumerate(names)
    }
    return {"per_class": figures} if names else {}


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary as a text table: figures in percent, "-" without ground truth."""
    lines = []
    if summary["max_detections"] != MAX_DETECTIONS:
        lines = [f"up to {summary['max_detections']} detections per image and class (COCO: {MAX_DETECTIONS})"]
    lines += _table(summary)
    if "lvis" in summary:
        lines += ["", f"by the rules of LVIS, up to {LVIS_DETECTIONS} detections per image", *_table(summary["lvis"])]
    return "\n".join(lines)


def _table(summary: Mapping[str, Any]) -> list[str]:
    kinds = {kind: title for kind, title in TITLES.items() if kind in summary}
    column = max(11, *(len(f"{title} AP ") for title in kinds.values()))
    lines = [_row("", kinds.values(), 11, column)]
    for figure in summary["segm"]:
        lines.append(_row(figure, [percent(summary[kind][figure]) for kind in kinds], 11, column))
    classes = {printable(name): aps for name, aps in summary.get("per_class", {}).items()}
    if classes:
        width = max(11, *(len(name) + 1 for name in classes))
        lines += ["", _row("class", [f"{title} AP" for title in kinds.values()], width, column)]
        for name, aps in classes.items():
            lines.append(_row(name, [percent(aps[f"{kind}_AP"]) for kind in kinds], width, column))
    return lines


def _row(title: str, cells: Iterable[str], width: int, column: int) -> str:
    return f"{title:>{width}}" + "".join(f"{cell:>{column}}" for cell in cells)


def percent(value: float) -> str:
    """AP or AR, a fraction, as it is printed: "37.5"; "-" for the -1 that means no ground truth."""
    return "-" if value < 0 else f"{100 * value:.1f}"
