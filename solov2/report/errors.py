"""Where average precision goes: each wrong or missed instance by its kind, and what AP50 would be without the kind.

The kinds are those of TIDE (Bolya et al., arXiv 2008.08115), for masks at an IoU of 0.5, with its thresholds:

    classification  IoU of 0.5 or more with an instance of another class
    localization    IoU of 0.1 to 0.5 with an instance of its class, the best one
    both            IoU of 0.1 to 0.5 with an instance of another class
    duplicate       of an instance that a prediction with a higher score has found
    background      IoU of at most 0.1 with everything
    missed          an instance that no prediction finds, and no wrong class or wrong outline explains

Which prediction finds which instance is pycocotools' answer, and so is AP50. Numbers and gains are those of tidecv, the
code of its authors, except that predictions in crowds are no errors, that 100 count per image and class, and that the
recalls of AP are rounded as in pycocotools.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

FOUND, IGNORED = "found", "ignored"
WRONG = ("classification", "localization", "both", "duplicate", "background")  # kinds of predictions
MISSED = "missed"
KINDS = (*WRONG, MISSED)
REPAIRABLE = ("classification", "localization")  # would find the instance if they were right
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU
RECALLS = np.linspace(0, 1, 101)


class Prediction(NamedTuple):
    """A prediction and what became of it.

    Attributes:
        image_id, category_id, score: of the result.
        kind: `FOUND`, `IGNORED` (in a crowd) or one of `WRONG`.
        truth: the annotation that it finds, or would without its error; None for background and what is ignored.
        iou: with `truth`; 0 without.
        row: its position in the results.
        shift: (x, y) of the center of its box against that of `truth`, in pixels; 0 without.
        side: of `truth`: the square root of its box's area, in pixels; 0 without.
    """

    image_id: int
    category_id: int
    score: float
    kind: str
    truth: int | None
    iou: float
    row: int
    shift: tuple[float, float] = (0.0, 0.0)
    side: float = 0.0


@dataclass(frozen=True)
class Errors:
    """The errors of a set of results.

    Attributes:
        predictions: those that count, by image and falling score.
        missed: the annotations that are missed.
        categories: annotation id -> category id, of the instances that count.
        ap50: of the masks, as a fraction; -1 without ground truth.
        gains: {kind: what AP50 gains without the errors of this kind}.
    """

    predictions: list[Prediction]
    missed: list[int]
    categories: dict[int, int]
    ap50: float
    gains: dict[str, float] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """{kind: number of errors}."""
        kinds = [prediction.kind for prediction in self.predictions]
        return {kind: kinds.count(kind) for kind in WRONG} | {MISSED: len(self.missed)}


def find_errors(truth: COCO, results: Sequence[Mapping[str, Any]], *, max_detections: int = 100) -> Errors:
    """Sort every prediction and every instance of the ground truth into a kind.

    Args:
        truth: the annotations; ids are from 1, as pycocotools needs them.
        results: instances in COCO's results format, with RLE masks.
        max_detections: how many count per image and class, those with the highest scores.
    """
    evaluation = _matches(truth, results, max_detections)
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for part in evaluation.evalImgs:
        if part is not None:
            by_image[part["image_id"]].append(part)
    rows = {entry["id"]: row for row, entry in enumerate(evaluation.cocoDt.dataset["annotations"])}
    predictions: list[Prediction] = []
    missed: list[int] = []
    categories: dict[int, int] = {}
    for image_id in sorted(by_image):
        found, unexplained, counted = _errors_of_image(evaluation, image_id, by_image[image_id], rows)
        predictions += found
        missed += unexplained
        categories |= counted
    return _measured(predictions, missed, categories)


def excused(errors: Errors, instances: Iterable[int]) -> Errors:
    """The errors that are left if some instances are found.

    Each is found by its prediction with the highest score, right or wrong; one without any does not count. Wrong
    predictions of these instances vanish.

    Args:
        errors: of the results.
        instances: annotation ids.
    """
    instances, taken = set(instances), {x.truth for x in errors.predictions if x.kind == FOUND}
    kept = []
    for x in sorted(errors.predictions, key=lambda x: -x.score):
        if x.truth not in instances or x.kind == FOUND:
            kept.append(x)
        elif x.truth is not None and x.truth not in taken and x.kind != "duplicate":
            taken.add(x.truth)
            kept.append(x._replace(kind=FOUND, category_id=errors.categories[x.truth]))
    unseen = set(errors.categories) & instances - taken
    missed = [number for number in errors.missed if number not in instances]
    return _measured(kept, missed, {n: category for n, category in errors.categories.items() if n not in unseen})


def _measured(predictions: list[Prediction], missed: list[int], categories: dict[int, int]) -> Errors:
    """With AP50, and what it gains without each kind of error."""
    errors = Errors(predictions, missed, categories, _ap50(predictions, categories, {}))
    errors.gains.update({kind: _ap50(*_without(errors, kind)) - errors.ap50 for kind in KINDS})
    return errors


def _matches(truth: COCO, results: Sequence[Mapping[str, Any]], max_detections: int) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        empty = COCO()
        empty.dataset = {**truth.dataset, "annotations": []}
        empty.createIndex()
        found = truth.loadRes([dict(entry) for entry in results]) if results else empty
        evaluation = COCOeval(truth, found, "segm")
        evaluation.params.iouThrs = np.array([FOREGROUND])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
    return evaluation


def _errors_of_image(
    evaluation: Any, image_id: int, parts: Sequence[Mapping[str, Any]], rows: Mapping[int, int]
) -> tuple[list[Prediction], list[int], dict[int, int]]:
    """(predictions, missed annotations, {annotation that counts: its category}) of an image."""
    known = {
        annotation["id"]: annotation
        for part in parts
        for annotation, ignored in zip(map(evaluation.cocoGt.anns.get, part["gtIds"]), part["gtIgnore"], strict=True)
        if not ignored
    }
    predictions, wrong = [], []
    for part in parts:
        for number, found in enumerate(part["dtIds"]):
            entry = evaluation.cocoDt.anns[found]
            match, ignored = int(part["dtMatches"][0, number]), bool(part["dtIgnore"][0, number])
            if match and not ignored:
                iou = _ious(evaluation, [entry], [known[match]])[0, 0]
                predictions.append(_prediction(entry, FOUND, known[match], iou, rows))
            elif ignored:
                predictions.append(_prediction(entry, IGNORED, None, 0.0, rows))
            else:
                wrong.append(entry)
    used = {prediction.truth for prediction in predictions}
    ious = _ious(evaluation, wrong, list(known.values()))
    explained: set[int] = set()
    for entry, row in zip(wrong, ious, strict=True):
        kind, near, iou = _kind(entry["category_id"], row, list(known.values()), used)
        predictions.append(_prediction(entry, kind, None if near is None else known[near], iou, rows))
        if near is not None and kind in REPAIRABLE:
            explained.add(near)
    predictions.sort(key=lambda prediction: (-prediction.score, prediction.row))  # equal scores as in pycocotools
    missed = [number for number in known if number not in used | explained]
    return predictions, missed, {number: annotation["category_id"] for number, annotation in known.items()}


def _prediction(
    entry: Mapping[str, Any], kind: str, truth: Mapping[str, Any] | None, iou: float, rows: Mapping[int, int]
) -> Prediction:
    found = Prediction(
        entry["image_id"], entry["category_id"], entry["score"], kind, None, float(iou), rows[entry["id"]]
    )
    if truth is None:
        return found
    x, y, width, height = truth["bbox"]
    left, top, across, down = entry["bbox"]
    shift = (left + across / 2 - x - width / 2, top + down / 2 - y - height / 2)
    return found._replace(truth=truth["id"], shift=shift, side=float(np.sqrt(width * height)))


def _ious(evaluation: Any, found: Sequence[Any], known: Sequence[Any]) -> np.ndarray:
    """IoU of masks, float64 [found, known]."""
    if not found or not known:
        return np.zeros((len(found), len(known)))
    masks = [[coco.annToRLE(entry) for entry in entries] for coco, entries in
             ((evaluation.cocoDt, found), (evaluation.cocoGt, known))]  # fmt: skip
    return np.asarray(mask_api.iou(*masks, [0] * len(known)))


def _kind(
    category: int, ious: np.ndarray, known: Sequence[Mapping[str, Any]], used: set[int | None]
) -> tuple[str, int | None, float]:
    """(kind, annotation, IoU with it) of a prediction that finds nothing; in TIDE's order."""
    same = np.array([annotation["category_id"] == category for annotation in known], dtype=bool)
    best_same, best_other = (_best(ious, chosen) for chosen in (same, ~same))
    if best_same is not None and BACKGROUND <= ious[best_same] <= FOREGROUND:
        return "localization", known[best_same]["id"], ious[best_same]
    if best_other is not None and ious[best_other] >= FOREGROUND:
        return "classification", known[best_other]["id"], ious[best_other]
    taken = np.array([annotation["id"] in used for annotation in known], dtype=bool)
    best_taken = _best(ious, same & taken)
    if best_taken is not None and ious[best_taken] >= FOREGROUND:
        return "duplicate", known[best_taken]["id"], ious[best_taken]
    if best_other is not None and ious[best_other] > BACKGROUND:
        return "both", known[best_other]["id"], ious[best_other]
    return "background", None, 0.0


def _best(ious: np.ndarray, chosen: np.ndarray) -> int | None:
    """Position of the highest IoU among the chosen; None if none is."""
    return int(np.where(chosen, ious, -1).argmax()) if chosen.any() else None


def _without(errors: Errors, kind: str) -> tuple[list[Prediction], dict[int, int], dict[int, int]]:
    """(predictions, categories of the instances that count, those taken off them) as if a kind of error did not occur.

    A wrong class or outline becomes right if the instance is still to be found and no other prediction with one of
    these two errors has a higher score for it; all other predictions of the kind vanish.
    """
    if kind == MISSED:
        gone = {number: errors.categories[number] for number in errors.missed}
        return errors.predictions, {n: c for n, c in errors.categories.items() if n not in gone}, gone
    ranked = sorted(errors.predictions, key=lambda prediction: -prediction.score)
    best = {x.truth: x.row for x in reversed(ranked) if x.kind in REPAIRABLE}
    for x in ranked:
        if x.kind == FOUND:
            best.pop(x.truth, None)
    kept = []
    for x in ranked:
        if x.kind != kind:
            kept.append(x)
        elif x.truth is not None and best.get(x.truth) == x.row:
            kept.append(x._replace(kind=FOUND, category_id=errors.categories[x.truth]))
    return kept, errors.categories, {}


def _ap50(predictions: Sequence[Prediction], categories: Mapping[int, int], gone: Mapping[int, int]) -> float:
    """The mean over the classes with instances; a class all of whose instances were taken off counts as perfect."""
    numbers = Counter(categories.values())
    values = class_precisions(predictions, numbers).mean(axis=1).tolist()
    values += [1.0 for category in set(gone.values()) if category not in numbers]
    return float(np.mean(values)) if values else -1.0


def class_precisions(predictions: Sequence[Prediction], numbers: Mapping[int, int]) -> np.ndarray:
    """COCO's interpolated precision of each class at 101 recalls, whose mean is the AP of the class.

    Args:
        predictions: of all classes, equal scores in the order in which they count.
        numbers: category id -> number of instances to find, at least 1.

    Returns:
        float64 [classes, 101], in the order of `numbers`.
    """
    by_class: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for prediction in predictions:
        if prediction.kind != IGNORED:
            by_class[prediction.category_id].append((prediction.score, prediction.kind == FOUND))
    rows = np.zeros((len(numbers), len(RECALLS)))
    for row, (category, number) in zip(rows, numbers.items(), strict=True):
        pairs = np.array(by_class.get(category, []), dtype=np.float64).reshape(-1, 2)
        row[:] = interpolated_precision(pairs[:, 0], pairs[:, 1] > 0, number)
    return rows


def interpolated_precision(scores: np.ndarray, right: np.ndarray, number: int) -> np.ndarray:
    """COCO's precision at 101 recalls, float64 [101]: the highest from each recall on.

    Args:
        scores: float64 [N], in the order in which equal ones count.
        right: bool [N].
        number: of instances to find, at least 1.
    """
    precision, recall = precision_recall(scores, right, number)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(recall, RECALLS, side="left")]


def precision_recall(scores: np.ndarray, right: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall, float64 [N] each, of the N highest scores; arguments as for `interpolated_precision`."""
    right = right[np.argsort(-scores, kind="mergesort")]
    hits = np.cumsum(right)
    return hits / (np.arange(1, len(right) + 1) + np.spacing(1)), hits / number
