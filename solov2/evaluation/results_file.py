"""Evaluation of a file in COCO's results format, without a model; equal to pycocotools' on that file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from solov2.data.annotations import all_finite, is_integer, parse_json, segmentation_fault
from solov2.data.coco import read_index, require_classes
from solov2.data.recognize import is_panoptic
from solov2.errors import InputError
from solov2.evaluation.coco import MAX_DETECTIONS, summarize
from solov2.evaluation.curves import GroundTruth
from solov2.evaluation.lvis import highest, require_lvis
from solov2.ops.images import MAX_PIXELS
from solov2.ops.masks import segmentation_to_rle

KEYS = ("image_id", "category_id", "segmentation", "score")


def evaluate_results(
    predictions: str | Path,
    annotations: str | Path,
    *,
    classes: Sequence[str] = (),
    crowd: str = "ignore",
    max_pixels: int = MAX_PIXELS,
    backend: str = "pycocotools",
    max_detections: int = MAX_DETECTIONS,
    boundary: bool = False,
    lvis: bool = False,
    per_class: bool = False,
) -> dict[str, Any]:
    """Compare a file of predictions with an annotation file; images are not needed.

    Args:
        predictions: JSON file in COCO's results format, see `FileResults`.
        annotations: annotation file in COCO's instance format.
        classes: names of the categories to evaluate; none means all.
        crowd, max_pixels: as for `solov2.data.coco.CocoInstances`.
        backend, max_detections, boundary, lvis, per_class: as for `solov2.evaluation.coco.summarize`.

    Returns:
        {"images": how many the annotation file has} and the figures, as `solov2.evaluation.coco.summarize` gives them.

    Raises:
        InputError: a file is missing or broken, or a backend is not installed.
    """
    truth, found = read_results(
        predictions, annotations, classes=classes, crowd=crowd, max_pixels=max_pixels, lvis=lvis
    )
    figures = summarize(
        truth,
        found,
        backend=backend,
        max_detections=max_detections,
        boundary=boundary,
        lvis=lvis,
        per_class=per_class,
    )
    return {"images": len(truth.images), **figures}


def read_results(
    predictions: str | Path,
    annotations: str | Path,
    *,
    classes: Sequence[str] = (),
    crowd: str = "ignore",
    max_pixels: int = MAX_PIXELS,
    lvis: bool = False,
) -> tuple[GroundTruth, FileResults]:
    """The annotations and the predictions that `evaluate_results` compares; arguments and errors are the same."""
    coco = read_index(annotations, crowd=crowd, max_pixels=max_pixels)
    if not coco.cats:
        raise InputError(f"{annotations} has no categories to evaluate")
    if lvis:
        require_lvis(coco, annotations)
    require_classes(classes, coco.cats.values(), annotations)
    chosen = [i for i, category in coco.cats.items() if not classes or category["name"] in classes]
    return GroundTruth(coco, set(coco.imgs), chosen), FileResults(predictions, coco, annotations)


class FileResults:
    """The predictions of a file in COCO's results format, checked; see `solov2.evaluation.curves.Found`.

    The file is a list of {"image_id", "category_id", "segmentation", "score"}, where a segmentation is an RLE or a list
    of polygons, and all rows or none may have a "bbox". As in pycocotools, the boxes are then those of the file, and
    their areas decide what is small, medium and large; otherwise both are those of the masks.

    Args:
        path: the file.
        coco: the annotations that it is compared with.
        annotations: name of their file, for messages.

    Raises:
        InputError: the file is missing or not in this format; the message names the row, counted from 1.
    """

    def __init__(self, path: str | Path, coco: COCO, annotations: str | Path) -> None:
        content = parse_json(Path(path), "results file")
        if is_panoptic(content):
            raise InputError(f"results file {path} is panoptic; compare it with solov2 panoptic-quality GT.json {path}")
        if not isinstance(content, list):
            raise InputError(f"results file {path} is not a list of objects with {', '.join(KEYS)}")
        for position, row in enumerate(content):
            fault = _fault(row, coco, annotations, boxes=_has_box(content[0]))
            if fault is not None:
                raise InputError(f"row {position + 1} of {path} {fault}")
            content[position] = _entry(row, coco)  # in place, because a file may have millions
        self._rows = content

    def by_category(self, most: int | None = None) -> dict[int, list[tuple[int, int]]]:
        """Category id -> (image id, position in the file)."""
        by_image: dict[int, list[int]] = defaultdict(list)
        for position, row in enumerate(self._rows):
            by_image[row["image_id"]].append(position)
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for image_id, positions in by_image.items():
            scores = np.array([self._rows[position]["score"] for position in positions], dtype=np.float64)
            for chosen in highest(scores, most).tolist():
                found[self._rows[positions[chosen]]["category_id"]].append((image_id, positions[chosen]))
        return found

    def results(self) -> list[dict[str, Any]]:
        """All rows, with RLE masks and without boxes."""
        return [{key: row[key] for key in KEYS} for row in self._rows]

    def entries(self, kind: str, rows: Iterable[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Yield these rows, the same for every kind, as pycocotools compares them."""
        return (dict(self._rows[position]) for _, position in rows)


def _has_box(row: Any) -> bool:
    return isinstance(row, dict) and row.get("bbox") not in (None, [])


def _fault(row: Any, coco: COCO, annotations: str | Path, *, boxes: bool) -> str | None:
    """What is wrong with a row, as a predicate, or None; `boxes`: whether it must have a bbox or must not."""
    if not isinstance(row, dict):
        return f"is not an object with {', '.join(KEYS)}"
    for key, known, what in (("image_id", coco.imgs, "image"), ("category_id", coco.cats, "category")):
        if not is_integer(row.get(key)):
            return f"has no integer {key}"
        if row[key] not in known:
            return f"has {key} {row[key]}, which is no {what} of {annotations}; results carry the ids of that file"
    if not all_finite([row.get("score")]):
        return "has no score that is a finite number"
    image = coco.imgs[row["image_id"]]
    fault = segmentation_fault(row, (int(image["height"]), int(image["width"])))
    if fault is not None:
        return f"cannot be evaluated: {fault}"
    if _has_box(row) != boxes:
        return f"has {'no' if boxes else 'a'} bbox, unlike row 1; write one in all rows or in none"
    if boxes and not (isinstance(row["bbox"], list) and len(row["bbox"]) == 4 and all_finite(row["bbox"])):
        return "has no bbox of four finite numbers x, y, width, height"
    return None


def _entry(row: dict[str, Any], coco: COCO) -> dict[str, Any]:
    """A row with what is evaluated only, and its segmentation as compressed RLE."""
    entry = {key: row[key] for key in KEYS}
    if _has_box(row):
        entry["bbox"] = row["bbox"]
    segmentation = row["segmentation"]
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        image = coco.imgs[row["image_id"]]
        entry["segmentation"] = segmentation_to_rle(segmentation, (int(image["height"]), int(image["width"])))
    return entry
