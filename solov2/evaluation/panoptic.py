"""Panoptic quality (Kirillov et al., arXiv 1801.00868), equal to panopticapi's, the evaluation code of COCO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from solov2.data.annotations import ImageId
from solov2.data.class_matching import distinct_names
from solov2.data.panoptic_file import PanopticFile, Segment
from solov2.errors import InputError, printable
from solov2.ops.panoptic import count_pairs, measure_segments

GROUPS = {"all": (True, False), "things": (True,), "stuff": (False,)}  # name -> `is_thing` of its categories
MIN_IOU = 0.5  # exclusive, so that a segment has at most one match
MAX_IGNORED = 0.5  # share of a prediction in void and crowds, above which it is not a false positive


class Counts(NamedTuple):
    """What is counted of a category: the sum of the IoU of the matches, and true positives (the matches), false
    positives and false negatives."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]  # of counts, not of tuples
        return Counts(self.iou + other.iou, self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    def qualities(self) -> dict[str, float | None]:
        """PQ, SQ and RQ of the category, fractions of 1; None if it has neither ground truth nor predictions."""
        weight = self.tp + self.fp / 2 + self.fn / 2
        if weight == 0:
            return {"pq": None, "sq": None, "rq": None}
        return {"pq": self.iou / weight, "sq": self.iou / self.tp if self.tp else 0.0, "rq": self.tp / weight}


def match_segments(
    truth_map: np.ndarray, truth: Sequence[Segment], found_map: np.ndarray, found: Mapping[int, int]
) -> dict[int, Counts]:
    """Match the segments of an image.

    As in panopticapi, the area of a segment of the ground truth is the one that the file states, so an IoU may exceed 1
    where that is wrong; and of several unmatched crowds of a category, only the last one listed hides predictions.

    Args:
        truth_map: int32 [H, W], ids of the ground truth; 0 is void, ids that `truth` lacks are in no segment.
        truth: the segments of the ground truth, in the order of the file.
        found_map: int32 [H, W], ids of the predictions; those that `found` lacks count as 0.
        found: id -> category id of the predictions; each has a pixel.

    Returns:
        category id -> counts, for the categories of which something was counted.
    """
    pairs = count_pairs(truth_map, found_map)
    areas = Counter[int]()  # of the predictions
    for (_, number), pixels in pairs.items():
        areas[number] += pixels
    listed = {segment.id: segment for segment in truth}
    counts: dict[int, Counts] = {}

    def count(category: int, **what: float) -> None:
        counts[category] = counts.get(category, Counts()) + Counts(**what)  # type: ignore[arg-type]

    matched, matched_found = set[int](), set[int]()
    for (number, found_number), pixels in pairs.items():
        segment = listed.get(number)
        if segment is None or segment.is_crowd or found.get(found_number) != segment.category_id:
            continue
        union = areas[found_number] + segment.area - pixels - pairs.get((0, found_number), 0)
        if union > 0 and pixels / union > MIN_IOU:
            count(segment.category_id, iou=pixels / union, tp=1)
            matched.add(number)
            matched_found.add(found_number)
    crowds: dict[int, int] = {}  # category id -> segment id
    for segment in truth:
        if segment.is_crowd:
            crowds[segment.category_id] = segment.id
        elif segment.id not in matched:
            count(segment.category_id, fn=1)
    for number, category in found.items():
        if number not in matched_found:
            ignored = pairs.get((0, number), 0) + pairs.get((crowds.get(category, -1), number), 0)
            if ignored / areas[number] <= MAX_IGNORED:
                count(category, fp=1)
    return counts


class PanopticEvaluator:
    """Collects results image by image and compares them with the ground truth of a panoptic annotation file.

    Only counts are kept, per image, so the figures depend neither on the order of the updates nor on how the images are
    distributed over ranks. Ranks exchange `predictions` and `merge` each other's.

    Args:
        truth: the ground truth.
        category_ids: the file's category id of each thing label; None for a class that the file lacks, whose
            predictions are dropped.
        stuff_category_ids: the same for each stuff label.
        image_ids: the images to evaluate; None means all that have an annotation. An image without predictions counts
            as one on which nothing was found.

    Raises:
        InputError: an id is not in the annotation file.
    """

    def __init__(
        self,
        truth: PanopticFile,
        category_ids: Sequence[int | None],
        stuff_category_ids: Sequence[int | None],
        *,
        image_ids: Iterable[ImageId] | None = None,
    ) -> None:
        self.truth, self.category_ids, self.stuff_category_ids = truth, [*category_ids], [*stuff_category_ids]
        wanted = set(truth.image_ids if image_ids is None else image_ids)
        self._require_known(wanted)
        known = {category.id for category in truth.categories}
        unknown = [x for x in (*category_ids, *stuff_category_ids) if x is not None and x not in known]
        if unknown:
            raise InputError(f"category id {unknown[0]} is not in {truth.path}; pass only ids that are")
        self.image_ids = [image_id for image_id in truth.image_ids if image_id in wanted]
        """The images to evaluate, in the order of the file."""
        self._wanted = wanted
        self.predictions: dict[ImageId, dict[int, Counts]] = {}
        """By image id, then by category id."""

    def update(self, image_ids: Sequence[ImageId], results: Sequence[Mapping[str, Any]]) -> None:
        """Add the results of some images; images that are not evaluated or already have results are skipped.

        Args:
            image_ids: one id per result.
            results: per image `panoptic_map` int32 [H, W] at the original size and `segments`, a list of dictionaries
                with `id`, `label` and `is_thing`; each has a pixel.

        Raises:
            InputError: an image id is not in the annotation file, a label has no category, or the PNG of an image
                cannot be read.
        """
        self._require_known(image_ids)
        for image_id, result in zip(image_ids, results, strict=True):
            if image_id in self._wanted and image_id not in self.predictions:
                self.add(image_id, result["panoptic_map"].cpu().numpy(), self.categories_of(image_id, result))

    def categories_of(self, image_id: ImageId, result: Mapping[str, Any]) -> dict[int, int]:
        """{segment id: category id} of the result of an image, without classes that the file lacks.

        Raises:
            InputError: a label has no category.
        """
        found = {segment["id"]: self._category(image_id, segment) for segment in result["segments"]}
        return {number: category for number, category in found.items() if category is not None}

    def add(self, image_id: ImageId, found_map: np.ndarray, found: Mapping[int, int]) -> None:
        """Add the segments of an image: a map int32 [H, W] and {id: category id}, as in `match_segments`."""
        segments = self.truth[image_id].segments
        self.predictions[image_id] = match_segments(self.truth.read_map(image_id), segments, found_map, found)

    def merge(self, shares: Iterable[Mapping[ImageId, dict[int, Counts]]]) -> None:
        """Add the `predictions` of several evaluators, possibly its own too; images already here are skipped."""
        for predictions in shares:
            self._require_known(predictions)
            for image_id, counts in predictions.items():
                if image_id in self._wanted:
                    self.predictions.setdefault(image_id, counts)

    def summarize(self, *, per_class: bool = False) -> dict[str, Any]:
        """Compute PQ, SQ and RQ, fractions of 1: the means over the categories that have a segment on either side.

        Args:
            per_class: add the figures of each category.

        Returns:
            {"all" | "things" | "stuff": {"pq", "sq", "rq", "n"}}, where n is the number of categories that count; if it
            is 0, the others are None. With `per_class`, also "per_class": {name: {"pq", "sq", "rq", "tp", "fp", "fn"}},
            where the first three are None for a category that does not count.
        """
        totals = self.totals()
        summary: dict[str, Any] = {
            group: _mean([totals[x.id].qualities() for x in self.truth.categories if x.is_thing in kinds])
            for group, kinds in GROUPS.items()
        }
        if per_class:
            names = distinct_names([category.name for category in self.truth.categories])
            summary["per_class"] = {
                name: {**counts.qualities(), "tp": counts.tp, "fp": counts.fp, "fn": counts.fn}
                for name, counts in zip(names, totals.values())
            }
        return summary

    def totals(self) -> dict[int, Counts]:
        """Category id -> counts over all images, for every category of the file."""
        totals = {category.id: Counts() for category in self.truth.categories}
        for image_id in self.image_ids:  # in the order of the file: sums of floats depend on it
            for category, counts in self.counts_of(image_id).items():
                totals[category] += counts
        return totals

    def counts_of(self, image_id: ImageId) -> dict[int, Counts]:
        """Category id -> counts of an image, for the categories of which something was counted."""
        if image_id in self.predictions:
            return self.predictions[image_id]
        missed = Counter(x.category_id for x in self.truth[image_id].segments if not x.is_crowd)
        return {category: Counts(fn=number) for category, number in missed.items()}

    def _category(self, image_id: ImageId, segment: Mapping[str, Any]) -> int | None:
        kind, ids = ("thing", self.category_ids) if segment["is_thing"] else ("stuff", self.stuff_category_ids)
        if not 0 <= segment["label"] < len(ids):
            raise InputError(
                f"{kind} label {segment['label']} of image {image_id} has no category: the annotation file has "
                f"{len(ids)} {kind} classes; evaluate a model with the same classes"
            )
        return ids[segment["label"]]

    def _require_known(self, image_ids: Iterable[ImageId]) -> None:
        unknown = next((image_id for image_id in image_ids if image_id not in self.truth), None)
        if unknown is not None:
            raise InputError(f"image {unknown!r} has no annotation in {self.truth.path}; evaluate only images that do")


def compare_files(truth: PanopticFile, found: PanopticFile, *, progress: bool = False) -> PanopticEvaluator:
    """Compare a file of predictions (`open_predictions`) with the ground truth.

    Raises:
        InputError: a PNG cannot be read, or the ids of a PNG and of the JSON of the predictions differ.
    """
    evaluator = PanopticEvaluator(truth, (), ())
    for image_id in tqdm(truth.image_ids, unit="image", leave=False, disable=None if progress else True):
        found_map = found.read_map(image_id)
        _, png, segments = found[image_id]
        listed, drawn = {x.id for x in segments}, set(measure_segments(found_map).ids.tolist())
        if listed != drawn:
            raise InputError(f"image {image_id}: {_difference(listed, drawn, found, png)}")
        evaluator.add(image_id, found_map, {x.id: x.category_id for x in segments})
    return evaluator


def _difference(listed: set[int], drawn: set[int], found: PanopticFile, png: str) -> str:
    if drawn - listed:
        return f"{found.folder / png} has pixels of segment {min(drawn - listed)}, which {found.path} does not list"
    return f"{found.path} lists segment {min(listed - drawn)}, which has no pixel in {found.folder / png}"


def _mean(qualities: Sequence[Mapping[str, float | None]]) -> dict[str, float | int | None]:
    """The means of the categories that count, and their number."""
    counting = [values for values in qualities if values["pq"] is not None]
    means: dict[str, float | int | None] = {
        figure: sum(values[figure] for values in counting) / len(counting) if counting else None  # type: ignore[misc]
        for figure in ("pq", "sq", "rq")
    }
    return {**means, "n": len(counting)}


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary as a text table: figures in percent, "-" where no category counts."""
    lines = ["".join(f"{title:>11}" for title in ("", "PQ", "SQ", "RQ", "N"))]
    lines += [_row(group.capitalize(), summary[group], 11, ("n",)) for group in GROUPS]
    classes = {printable(name): figures for name, figures in summary.get("per_class", {}).items()}
    if classes:
        width = max(11, *(len(name) + 1 for name in classes))
        titles = ("PQ", "SQ", "RQ", "TP", "FP", "FN")
        lines += ["", f"{'class':>{width}}" + "".join(f"{title:>11}" for title in titles)]
        lines += [_row(name, figures, width, ("tp", "fp", "fn")) for name, figures in classes.items()]
    return "\n".join(lines)


def _row(title: str, figures: Mapping[str, Any], width: int, numbers: Sequence[str]) -> str:
    shown = [percent(figures[name]) for name in ("pq", "sq", "rq")] + [str(figures[name]) for name in numbers]
    return f"{title:>{width}}" + "".join(f"{text:>11}" for text in shown)


def percent(value: float | None) -> str:
    """A quality, a fraction, as it is printed: "42.1"; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"
