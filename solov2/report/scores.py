"""What scores say: precision and recall, the threshold with the best F1, calibration, and the confusion of classes.

All of it for masks at an IoU of 0.5, from the kinds of `solov2.report.errors`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from solov2.report.errors import FOUND, IGNORED, RECALLS, Errors, class_precisions, precision_recall


class Operating(NamedTuple):
    """Figures at each score of a prediction, from high to low: float64 [N] each."""

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall."""
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-12)

    def best(self) -> tuple[float, float]:
        """(score threshold, F1) where F1 is highest; (0, 0) without predictions."""
        if not len(self.scores):
            return 0.0, 0.0
        at = int(self.f1.argmax())
        return float(self.scores[at]), float(self.f1[at])


def operating_points(errors: Errors, category: int | None = None) -> Operating:
    """Precision and recall of all predictions together, or of those of one class, down to each score."""
    chosen = [x for x in errors.predictions if x.kind != IGNORED and category in (None, x.category_id)]
    number = sum(category in (None, own) for own in errors.categories.values())
    scores, right = np.array([x.score for x in chosen]), np.array([x.kind == FOUND for x in chosen], dtype=bool)
    order = np.argsort(-scores, kind="mergesort")
    precision, recall = precision_recall(scores, right, max(1, number))
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of equal scores, a threshold takes all
    return Operating(scores[order][last], precision[last], recall[last])


def mean_precision(errors: Errors) -> np.ndarray:
    """COCO's interpolated precision at 101 recalls, the mean over the classes with instances: float64 [101]."""
    precisions = class_precisions(errors.predictions, Counter(errors.categories.values()))
    return precisions.mean(axis=0) if len(precisions) else np.zeros(len(RECALLS))


class Bin(NamedTuple):
    """Predictions of similar scores: how many, their mean score, and the share that is right."""

    number: int
    score: float
    right: float


def calibration(errors: Errors, bins: int = 10) -> list[Bin]:
    """Predictions by score, in intervals of equal width; without the empty ones."""
    chosen = [(x.score, x.kind == FOUND) for x in errors.predictions if x.kind != IGNORED]
    table = np.array(chosen, dtype=np.float64).reshape(-1, 2)
    places = np.minimum((table[:, 0] * bins).astype(int), bins - 1)
    rows = [table[places == place] for place in range(bins)]
    return [Bin(len(row), *row.mean(axis=0).tolist()) for row in rows if len(row)]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean distance of score and share of right predictions."""
    total = sum(entry.number for entry in bins)
    return sum(entry.number * abs(entry.score - entry.right) for entry in bins) / max(1, total)


def confusion(errors: Errors, categories: Sequence[int], threshold: float) -> np.ndarray:
    """How often each class is taken for each other, with the predictions of at least a score.

    Returns:
        int64 [C + 1, C + 1]: row is the true class, the last one background; column the predicted one, the last one
        nothing. Localization errors and duplicates count as background: they add a prediction where nothing is left.
    """
    rows = {category: row for row, category in enumerate(categories)}
    table = np.zeros((len(rows) + 1, len(rows) + 1), dtype=np.int64)
    seen: set[int] = set()
    for x in errors.predictions:
        if x.kind == IGNORED or x.score < threshold or x.category_id not in rows:
            continue
        known = x.truth is not None and x.kind in (FOUND, "classification") and x.truth not in seen
        if known and x.truth is not None:
            seen.add(x.truth)
            table[rows[errors.categories[x.truth]], rows[x.category_id]] += 1
        else:
            table[-1, rows[x.category_id]] += 1
    for number, category in errors.categories.items():
        if number not in seen and category in rows:
            table[rows[category], -1] += 1
    return table
