"""What to mend first: the losses of average precision, largest first, each with its place and what to do about it.

Losses are points of AP50 as `solov2.report.errors` measures them. They do not add up: two errors may cost the same
instance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from solov2.report.errors import FOUND, KINDS, MISSED, Errors, Prediction

MIN_GAIN = 0.005  # AP50 below which a loss is not worth a place in the list
HIGH_CUT = 0.1  # lowest score above which a score threshold may cost recall
TAIL = 0.2  # share of the predictions with the lowest scores
PRECISE = 0.5  # precision of that tail from which a lower threshold would find more
SHARP = 0.9  # AP75 / AP50 of the targets below which their resolution blurs outlines
SMALL = 32.0  # pixels of the network's input, the side of a small instance
MOST = 0.5


class Finding(NamedTuple):
    """A loss and its remedy.

    Attributes:
        area: "data", "grids", "resolution", "training" or "thresholds".
        kind: one of `solov2.report.errors.KINDS`, "grids" or "threshold".
        gain: AP50 lost to it, a fraction.
        what: the loss, in one sentence.
        remedy: what to do, in one sentence.
    """

    area: str
    kind: str
    gain: float
    what: str
    remedy: str


def rank(
    errors: Errors,
    names: Mapping[int, str],
    *,
    ceiling: Mapping[str, float] | None = None,
    sides: Mapping[int, float] | None = None,
) -> list[Finding]:
    """The losses above `MIN_GAIN`, the largest first.

    Args:
        errors: of the results.
        names: of the classes, by category id.
        ceiling: the figures "AP50" and "AP75" of the training targets (`eval --oracle`); None: not known.
        sides: square root of the area of each annotation, in pixels of the network's input.
    """
    gains = dict(errors.gains)
    findings = []
    if ceiling is not None and ceiling["AP50"] >= 0:
        lost = 1 - ceiling["AP50"]
        gains[MISSED] = max(0.0, gains[MISSED] - lost)  # what has no cell cannot be found
        findings.append(_grids(lost))
    if _cut_high(errors.predictions):
        findings.append(_threshold(gains.pop(MISSED), min(x.score for x in errors.predictions)))
    makers = {
        "classification": lambda gain: _classification(errors, names, gain),
        "localization": lambda gain: _localization(ceiling, gain),
        "background": lambda gain: _background(errors.predictions, gain),
        MISSED: lambda gain: _missed(errors, sides or {}, gain),
        "duplicate": _duplicate,
        "both": _both,
    }
    findings += [makers[kind](gains[kind]) for kind in KINDS if kind in gains]
    return sorted((x for x in findings if x.gain >= MIN_GAIN), key=lambda finding: -finding.gain)


def _grids(gain: float) -> Finding:
    return Finding(
        "grids",
        "grids",
        gain,
        f"The training targets themselves reach an AP50 of only {100 * (1 - gain):.1f}: some instances have no cell.",
        "Compare model.grid_sizes, model.scale_ranges and the input size with the data: solov2 check-data proposes all "
        "three.",
    )


def _cut_high(predictions: Sequence[Prediction]) -> bool:
    """Whether the predictions end at a high score, and are still mostly right there."""
    scores = np.array([x.score for x in predictions if x.kind != "ignored"])
    if len(scores) == 0 or scores.min() < HIGH_CUT:
        return False
    right = np.array([x.kind == FOUND for x in predictions if x.kind != "ignored"])
    tail = right[np.argsort(scores)[: max(1, int(TAIL * len(scores)))]]
    return bool(tail.mean() >= PRECISE)


def _threshold(gain: float, lowest: float) -> Finding:
    return Finding(
        "thresholds",
        "threshold",
        gain,
        f"No prediction scores below {lowest:.2f}, and most of the lowest are right: a threshold cuts off instances.",
        "Lower model.score_threshold for evaluation (COCO's AP ranks all predictions), and choose one for use from the "
        "curve of F1.",
    )


def _classification(errors: Errors, names: Mapping[int, str], gain: float) -> Finding:
    wrong = [x for x in errors.predictions if x.kind == "classification" and x.truth is not None]
    pairs = Counter((errors.categories[x.truth], x.category_id) for x in wrong if x.truth is not None)
    if not pairs:
        return Finding("training", "classification", gain, "Some instances get the wrong class.", "")
    (true, said), number = pairs.most_common(1)[0]
    instances = Counter(errors.categories.values())[true]
    both_ways = all(
        pairs[pair] > MOST * Counter(errors.categories.values())[pair[0]] for pair in ((true, said), (said, true))
    )
    what = f"{names[true]} is taken for {names[said]} ({number} of {instances:,} instances)."
    if both_ways:
        return Finding(
            "data", "classification", gain, f"{what} The same happens the other way round.",
            "Compare the names and ids of the classes in the annotations of training and validation.",
        )  # fmt: skip
    return Finding(
        "training", "classification", gain, what, "Add examples of the two classes side by side, or join them."
    )


def _localization(ceiling: Mapping[str, float] | None, gain: float) -> Finding:
    what = "Instances are found in the right place, but with an outline that overlaps them by less than half."
    if ceiling is not None and ceiling["AP75"] < SHARP * ceiling["AP50"]:
        return Finding(
            "resolution", "localization", gain, what,
            "The targets' own outlines are coarse at this size: raise model.input_scale and data.train_scales.",
        )  # fmt: skip
    return Finding(
        "training", "localization", gain, what,
        "Compare some annotations with their images (shifted or coarse outlines are learned), then train longer.",
    )  # fmt: skip


def _background(predictions: Sequence[Prediction], gain: float) -> Finding:
    scores = {kind: [x.score for x in predictions if x.kind == kind] for kind in (FOUND, "background")}
    what = f"{len(scores['background']):,} predictions show nothing that is annotated."
    if scores["background"] and scores[FOUND] and np.median(scores["background"]) >= np.median(scores[FOUND]):
        return Finding(
            "data", "background", gain, f"{what} They score as high as right ones.",
            "Look at them: objects without an annotation look like this.",
        )  # fmt: skip
    return Finding(
        "training", "background", gain, what,
        "Add images without objects (data.keep_empty), or raise the score threshold where you use the model.",
    )  # fmt: skip


def _missed(errors: Errors, sides: Mapping[int, float], gain: float) -> Finding:
    small = [number for number in errors.missed if sides.get(number, np.inf) < SMALL]
    what = f"{len(errors.missed):,} of {len(errors.categories):,} instances are not found."
    if len(small) > MOST * len(errors.missed):
        return Finding(
            "resolution", MISSED, gain, f"{what} {len(small):,} of them are smaller than {SMALL:.0f} px in the input.",
            "Raise model.input_scale and data.train_scales, or predict in tiles (solov2 predict --tile).",
        )  # fmt: skip
    return Finding("training", MISSED, gain, what, "Train longer, or add examples of what the page shows as missed.")


def _duplicate(gain: float) -> Finding:
    return Finding(
        "thresholds", "duplicate", gain, "Instances are found more than once.",
        "Raise model.nms_sigma, so that Matrix NMS suppresses more, or raise model.score_threshold.",
    )  # fmt: skip


def _both(gain: float) -> Finding:
    return Finding(
        "training", "both", gain, "Predictions of the wrong class overlap an instance by less than half.",
        "Train longer; look at the worst images for what they have in common.",
    )  # fmt: skip
