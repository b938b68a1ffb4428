"""What to fix first: the losses of average precision, largest first, each with its place and what to do about it.

Losses are points of AP50 as `solov2.report.errors` measures them, or of PQ as `solov2.report.panoptic_errors` does.
They do not add up: two errors may cost the same instance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from solov2.report.errors import FOUND, KINDS, MISSED, Errors, Prediction, excused
from solov2.report.panoptic_errors import Loss, PanopticErrors
from solov2.report.scores import confusion, operating_points

MIN_GAIN = 0.005  # AP50 or PQ below which a loss is not worth a place in the list
HIGH_CUT = 0.1  # lowest score above which a score threshold may cost recall
TAIL = 0.2  # share of the predictions with the lowest scores
PRECISE = 0.5  # precision of that tail from which a lower threshold would find more
SHARP = 0.9  # AP75 / AP50 of the targets below which their resolution blurs outlines
CRAMPED = 1.0  # sides in cells of the grid; in the paper's recipe all but the smallest objects have more
SMALL = 32.0  # pixels of the network's input, the side of a small instance
MOST = 0.5
LOW = 0.25  # quantile of the scores of right predictions that those of nothing reach if objects lack an annotation
SHIFTED = 0.1  # median shift, in sides of the instances, from which it is named
STEADY = 0.8  # share of the predictions that must be shifted in this direction
FEW = 100  # instances of a class in training


class Finding(NamedTuple):
    """A loss and its remedy.

    Attributes:
        area: "data", "grids", "resolution", "training" or "thresholds".
        kind: one of `KINDS` of `solov2.report.errors` or `solov2.report.panoptic_errors`, "grids", "threshold"
            or "targets".
        gain: what is lost to it, a fraction: AP50 of instances, PQ of panoptic models.
        what: the loss, in one sentence.
        remedy: what to do, in one sentence.
    """

    area: str
    kind: str
    gain: float
    what: str
    remedy: str


class Size(NamedTuple):
    """How large an instance is for the network.

    Attributes:
        side: square root of its area, in pixels of the input.
        share: square root of its box's area, in cells of the grid that it is assigned to; of several, the finest.
    """

    side: float
    share: float


class Ceiling(NamedTuple):
    """What the training targets themselves lose, if a network predicts them exactly.

    Attributes:
        cells: AP50 lost to instances that have no cell of their own.
        outlines: AP50 lost to outlines at a quarter of the input's resolution.
        sharpness: AP75 / AP50.
    """

    cells: float
    outlines: float
    sharpness: float

    @classmethod
    def of(cls, errors: Errors, figures: Mapping[str, float]) -> Ceiling | None:
        """From the errors and the mask figures of the training targets; None without ground truth."""
        if errors.ap50 <= 0:
            return None
        outlines = errors.gains["localization"]
        return cls(max(0.0, 1 - errors.ap50 - outlines), outlines, figures["AP75"] / errors.ap50)


def rank(
    errors: Errors,
    names: Mapping[int, str],
    *,
    ceiling: Ceiling | None = None,
    sizes: Mapping[int, Size] | None = None,
    trained: Mapping[int, int] | None = None,
) -> list[Finding]:
    """The losses above `MIN_GAIN`, the largest first.

    Args:
        errors: of the results.
        names: of the classes, by category id.
        ceiling: of the training targets; None: not known.
        sizes: of each annotation, in the network's input.
        trained: number of instances of each category in training.
    """
    sizes, before = sizes or {}, errors.ap50
    cramped = [number for number in errors.categories if number in sizes and sizes[number].share < CRAMPED]
    errors = excused(errors, cramped)
    findings = [_small_cells(errors.ap50 - before, len(cramped), len(sizes))]
    gains = dict(errors.gains)
    if ceiling is not None:
        gains[MISSED] = max(0.0, gains[MISSED] - ceiling.cells)  # what has no cell cannot be found
        gains["localization"] = max(0.0, gains["localization"] - ceiling.outlines)
        findings += [_grids(ceiling.cells), _targets(ceiling.outlines)]
    if _cut_high(errors.predictions):
        findings.append(_threshold(gains.pop(MISSED), min(x.score for x in errors.predictions)))
    makers = {
        "classification": lambda gain: _classification(errors, names, gain),
        "localization": lambda gain: _localization(errors, ceiling, gain),
        "background": lambda gain: _background(errors, gain),
        MISSED: lambda gain: _missed(errors, names, sizes, trained, gain),
        "duplicate": _duplicate,
        "both": _both,
    }
    return ordered([*findings, *(makers[kind](gains[kind]) for kind in KINDS if kind in gains)])


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Those above `MIN_GAIN`, the largest first."""
    return sorted((x for x in findings if x.gain >= MIN_GAIN), key=lambda finding: -finding.gain)


def _grids(gain: float) -> Finding:
    return Finding(
        "grids", "grids", gain,
        f"The training targets themselves lose {100 * gain:.1f} points of AP50: some instances have no cell.",
        "Compare model.grid_sizes, model.scale_ranges and the input size with the data: solov2 check-data proposes all "
        "three.",
    )  # fmt: skip


def _small_cells(gain: float, number: int, total: int) -> Finding:
    return Finding(
        "grids", "grids", gain,
        f"{number:,} of {total:,} instances are smaller than a cell of their grid: a cell has one class and one mask.",
        "Raise model.grid_sizes, or model.input_scale and data.train_scales: solov2 check-data proposes values.",
    )  # fmt: skip


def _targets(gain: float) -> Finding:
    return Finding(
        "resolution", "targets", gain,
        "At this resolution the training targets themselves overlap some instances by less than half.",
        "Raise model.input_scale and data.train_scales, or predict in tiles (solov2 predict --tile).",
    )  # fmt: skip


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
        "thresholds", "threshold", gain,
        f"No prediction scores below {lowest:.2f}, and most of the lowest are right: a threshold cuts off instances.",
        "Lower model.score_threshold for evaluation (COCO's AP ranks all predictions), and choose one for use from the "
        "curve of F1.",
    )  # fmt: skip


def _classification(errors: Errors, names: Mapping[int, str], gain: float) -> Finding:
    categories = sorted(names)
    table = confusion(errors, categories, 0.0)[:-1, :-1]  # by the prediction with the highest score of each instance
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(table, 0)
    true, said = divmod(int(table.argmax()), len(categories))
    number, instances = int(table[true, said]), Counter(errors.categories.values())[categories[true]]
    if not number:
        return Finding(
            "thresholds", "classification", gain,
            "Instances are found, but also predicted as other classes with lower scores.",
            "Use the score threshold with the best F1, which leaves these out; add examples of similar classes.",
        )  # fmt: skip
    what = f"{names[categories[true]]} is taken for {names[categories[said]]} ({number:,} of {instances:,} instances)."
    other = int(shares[said].argmax())
    if other != said and min(shares[true, said], shares[said, other]) > MOST:
        return Finding(
            "data", "classification", gain,
            f"{what} {names[categories[said]]}, in turn, is taken for {names[categories[other]]}.",
            "Compare the names and ids of the classes in the annotations of training and validation.",
        )  # fmt: skip
    return Finding(
        "training", "classification", gain, what, "Add examples of the two classes side by side, or join them."
    )


def _localization(errors: Errors, ceiling: Ceiling | None, gain: float) -> Finding:
    what = "Instances are found in the right place, but with an outline that overlaps them by less than half."
    shift = _common_shift(errors.predictions)
    if shift is not None:
        sides = (("to the left", "to the right"), ("up", "down"))
        parts = [f"{abs(x):.0f} px {side[x > 0]}" for x, side in zip(shift, sides) if abs(x) >= 1]
        return Finding(
            "data", "localization", gain,
            f"Predictions are shifted against the annotations by {' and '.join(parts)} (the median).",
            "Compare annotations with their images, in training and in validation: one of them is shifted.",
        )  # fmt: skip
    if ceiling is not None and ceiling.sharpness < SHARP:
        return Finding(
            "resolution", "localization", gain, what,
            "The targets' own outlines are coarse at this size: raise model.input_scale and data.train_scales.",
        )  # fmt: skip
    return Finding(
        "training", "localization", gain, what,
        "Compare some annotations with their images (coarse outlines are learned), then train longer.",
    )  # fmt: skip


def _common_shift(predictions: Sequence[Prediction]) -> tuple[float, float] | None:
    """Median shift (x, y) in pixels of the masks against their instances; None if they are not shifted alike."""
    best: dict[int | None, Prediction] = {}  # of each instance, the prediction with the highest score
    for x in sorted(predictions, key=lambda x: -x.score):
        if x.kind in (FOUND, "localization"):
            best.setdefault(x.truth, x)
    rows = [(*x.shift, x.side) for x in best.values()]
    if not rows:
        return None
    table = np.array(rows)  # [N, 3]
    middle = np.median(table[:, :2], axis=0)
    length = float(np.hypot(*middle))
    along = table[:, :2] @ middle / max(length, 1e-9)  # in the direction of the median
    alike = np.mean(along > length / 2) >= STEADY
    if not alike or length <= max(1.5, SHIFTED * np.median(table[:, 2])):
        return None
    return float(middle[0]), float(middle[1])


def _background(errors: Errors, gain: float) -> Finding:
    what = f"{errors.counts()['background']:,} predictions show nothing that is annotated."
    threshold, _ = operating_points(errors).best()  # most predictions have scores that nobody uses
    chosen = [x for x in errors.predictions if x.score >= threshold]
    scores = {kind: [x.score for x in chosen if x.kind == kind] for kind in (FOUND, "background")}
    if all(scores.values()) and np.median(scores["background"]) >= np.quantile(scores[FOUND], LOW):
        return Finding(
            "data", "background", gain, f"{what} Many of them score as high as right ones.",
            "Look at them: objects without an annotation look like this.",
        )  # fmt: skip
    return Finding(
        "training", "background", gain, what,
        "Add images without objects (data.keep_empty), or raise the score threshold where you use the model.",
    )  # fmt: skip


def _missed(
    errors: Errors,
    names: Mapping[int, str],
    sizes: Mapping[int, Size],
    trained: Mapping[int, int] | None,
    gain: float,
) -> Finding:
    small = [number for number in errors.missed if number in sizes and sizes[number].side < SMALL]
    what = f"{len(errors.missed):,} of {len(errors.categories):,} instances are not found."
    classes = Counter(errors.categories[number] for number in errors.missed)
    rare = [category for category in classes if trained is not None and trained.get(category, 0) < FEW]
    if sum(classes[category] for category in rare) > MOST * len(errors.missed):
        shown = ", ".join(f"{names[x]} ({(trained or {}).get(x, 0):,})" for x in rare[:5])
        return Finding(
            "data", MISSED, gain, f"{what} Most are of classes with few instances in training: {shown}.",
            "Annotate more images of these classes, start from published weights, or set data.copy_paste.",
        )  # fmt: skip
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


def rank_panoptic(
    errors: PanopticErrors, names: Mapping[int, str], *, ceiling: PanopticErrors | None = None
) -> list[Finding]:
    """The losses of PQ above `MIN_GAIN`, the largest first.

    Args:
        errors: of the results.
        names: of the classes, by category id.
        ceiling: the errors of the training targets; None: not known.
    """
    findings, limits = [], {} if ceiling is None else {(x.kind, x.group): x.gain for x in ceiling.losses}
    if limits:
        outlines = sum(gain for (kind, _), gain in limits.items() if kind == "outline")
        cells = sum(limits.values()) - outlines
        findings = [
            _grids(cells)._replace(what="The training targets themselves miss or mistake some segments."),
            _targets(outlines)._replace(what="At this resolution the targets' own outlines are not exact."),
        ]
    for loss in errors.losses:
        area, what, remedy = _panoptic_texts(loss, errors, names)
        gain = max(0.0, loss.gain - limits.get((loss.kind, loss.group), 0.0))
        findings.append(Finding(area, loss.kind, gain, f"{loss.group.capitalize()}: {what}", remedy))
    return ordered(findings)


def _panoptic_texts(loss: Loss, errors: PanopticErrors, names: Mapping[int, str]) -> tuple[str, str, str]:
    """(area, what is lost, remedy)."""
    number, stuff = f"{loss.number:,}", loss.group == "stuff"
    if loss.kind == "classification":
        chosen = errors.stuff if stuff else errors.things
        pairs = {pair: len(ious) for pair, ious in errors.confusion.mistaken.items() if pair[0] in chosen}
        (true, said), most = max(pairs.items(), key=lambda item: item[1])
        what = f"{number} segments have the wrong class, mostly {names[true]} taken for {names[said]} ({most:,})."
        moved = {pair: n for pair, n in pairs.items() if n > MOST * errors.numbers[pair[0]]}
        others = [names[other] for origin, other in moved if origin == said]
        if (true, said) in moved and others:
            remedy = "Compare the names and ids of the classes in the annotations of training and validation."
            return "data", f"{what} {names[said]}, in turn, is taken for {others[0]}.", remedy
        return "training", what, "Add examples of the two classes side by side, or join them."
    if loss.kind == "missed":
        remedy = "Train longer, or lower model." + ("stuff_area_limit." if stuff else "panoptic_score_threshold.")
        return "training", f"{number} segments are missed.", remedy
    if loss.kind == "background":
        remedy = "Look at them: objects without an annotation look like this. If they are wrong, raise model."
        remedy += "stuff_area_limit." if stuff else "panoptic_score_threshold."
        return "thresholds", f"{number} predicted segments match nothing.", remedy
    remedy = "Compare some annotations with their images (coarse outlines are learned), then train longer."
    return "training", "segments are found, but with outlines worse than those of the training targets.", remedy
