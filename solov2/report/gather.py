"""Evaluate a run for its page: figures, ceiling, errors, what to fix, and pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from solov2 import distributed
from solov2.benchmarking.measure import peak_memory
from solov2.compute import Compute
from solov2.config import Config
from solov2.data.annotations import ImageId
from solov2.data.class_matching import distinct_names
from solov2.data.coco import CocoInstances
from solov2.data.panoptic import CocoPanoptic
from solov2.errors import count
from solov2.evaluate import Subject, evaluate_subject, oracle_subject
from solov2.evaluation.coco import CocoEvaluator
from solov2.evaluation.curves import GroundTruth
from solov2.evaluation.panoptic import Counts, PanopticEvaluator
from solov2.ops.resize import padded_size, resized_size
from solov2.report.errors import FOUND, IGNORED, Errors, find_errors
from solov2.report.facts import RunFacts
from solov2.report.panoptic_errors import PanopticErrors, SegmentConfusion, find_losses
from solov2.report.ranking import Ceiling, Size, rank, rank_panoptic
from solov2.report.run_files import count_training, is_number
from solov2.report.scores import operating_points
from solov2.training.environment import environment

Evaluator = CocoEvaluator | PanopticEvaluator


@dataclass
class Evaluated:
    """A model with its data, and the outcome of its evaluation.

    Attributes:
        subject: what was evaluated.
        evaluator: with all results.
        summary: with "per_class".
        seconds: duration of the evaluation.
        confusion: of panoptic results.
        ceiling: evaluator and summary of the training targets.
    """

    subject: Subject
    evaluator: Evaluator
    summary: dict[str, Any]
    seconds: float
    confusion: SegmentConfusion
    ceiling: tuple[Evaluator, Mapping[str, Any]]


@dataclass
class ConfusionCounter:
    """Counts the confusion of panoptic results while a subject is evaluated."""

    subject: Subject
    confusion: SegmentConfusion = field(default_factory=SegmentConfusion)

    def __post_init__(self) -> None:
        dataset, own = self.subject.dataset, self.subject
        self._classes = None  # of panoptic results
        if isinstance(dataset, CocoPanoptic):
            self._classes = PanopticEvaluator(dataset.panoptic, own.category_ids, own.stuff_category_ids)

    def add(self, image_ids: Sequence[ImageId], results: Sequence[Mapping[str, Any]]) -> None:
        """Add the results of a batch; those of instances are not counted."""
        if self._classes is None:
            return
        for image_id, result in zip(image_ids, results, strict=True):
            found = self._classes.categories_of(image_id, result)
            self.confusion.add(self._classes.truth, image_id, result["panoptic_map"].cpu().numpy(), found)

    def gathered(self) -> SegmentConfusion:
        """The confusion of all ranks, which call this together; complete on rank 0."""
        shares = distributed.gather_objects(self.confusion)
        if distributed.is_main():
            self.confusion.merge([share for rank, share in enumerate(shares) if rank])
        return self.confusion


def evaluate_for_report(
    subject: Subject,
    split: str,
    compute: Compute,
    *,
    batch_size: int = 1,
    backend: str = "pycocotools",
    boundary: bool = False,
    lvis: bool = False,
    write: Callable[[Sequence[ImageId], Sequence[Mapping[str, Any]]], None] | None = None,
) -> Evaluated:
    """Evaluate a subject, and the training targets of the same images; all ranks call this together.

    The arguments are those of `solov2.evaluate.evaluate_subject`, and `split` is "val" or "train". The figures of each
    class are added, and those of boundaries where faster-coco-eval is installed.
    """
    counter, start = ConfusionCounter(subject), time.perf_counter()

    def add(image_ids: Sequence[ImageId], results: Sequence[Mapping[str, Any]]) -> None:
        counter.add(image_ids, results)
        if write is not None:
            write(image_ids, results)

    evaluator, summary = evaluate_subject(
        subject,
        compute,
        batch_size=batch_size,
        backend=backend,
        boundary=boundary or (isinstance(subject.dataset, CocoInstances) and has_boundaries()),
        lvis=lvis,
        per_class=True,
        write=add,
    )
    seconds = time.perf_counter() - start
    targets = evaluate_subject(oracle_subject(subject.config, split), compute, per_class=True)
    return Evaluated(subject, evaluator, summary, seconds, counter.gathered(), targets)


def has_boundaries() -> bool:
    """Whether the report of an instance model has the AP of boundaries: where faster-coco-eval is installed."""
    return importlib.util.find_spec("faster_coco_eval") is not None


def gather_facts(
    evaluated: Evaluated, compute: Compute, *, name: str, log: Sequence[Mapping[str, Any]] = ()
) -> RunFacts:
    """The facts of a run, from its evaluation; on rank 0."""
    config, evaluator, summary = evaluated.subject.config, evaluated.evaluator, evaluated.summary
    if isinstance(evaluator, PanopticEvaluator):
        trained = count_training(config, {x.id: x.name for x in evaluator.truth.categories})
        targets = evaluated.ceiling[0]
        assert isinstance(targets, PanopticEvaluator)
        facts = _panoptic_facts(name, evaluator, summary, evaluated.confusion, _losses(targets, SegmentConfusion()))
    else:
        truth = complete_truth(evaluator.truth)
        trained = count_training(config, {x: category["name"] for x, category in truth.cats.items()})
        targets, figures = evaluated.ceiling
        assert isinstance(targets, CocoEvaluator)
        limit = Ceiling.of(find_errors(truth, targets.results()), figures["segm"])
        sizes = input_sizes(truth, config)
        facts = instance_facts(
            name, truth, evaluator.results(), summary, limit=limit, sizes=sizes, trained=trained,
            max_detections=config.data.max_detections,
        )  # fmt: skip
    rows = [row for row in log if row.get("kind") == "start"]
    return dataclasses.replace(
        facts,
        ceiling=evaluated.ceiling[1],
        log=log,
        trained=trained,
        speed=_speed(evaluated, compute, log),
        config=config,
        environment=_environment(rows[-1] if rows else environment(compute.device)),
    )


def instance_facts(
    name: str,
    truth: COCO,
    results: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    *,
    limit: Ceiling | None = None,
    sizes: Mapping[int, Size] | None = None,
    trained: Mapping[int, int] | None = None,
    max_detections: int = 100,
) -> RunFacts:
    """The facts of instances in COCO's results format, which need no model.

    Args:
        name: shown as the title.
        truth: the annotations, see `complete_truth`.
        results: with RLE masks.
        summary: of the same results, with "per_class".
        limit, sizes, trained: as for `rank`.
        max_detections: how many count per image and class.
    """
    categories = sorted(truth.cats)
    names = dict(zip(categories, distinct_names([truth.cats[x]["name"] for x in categories]), strict=True))
    errors = find_errors(truth, results, max_detections=max_detections)
    return RunFacts(
        name,
        summary,
        errors,
        names,
        image_qualities(errors, truth),
        rank(errors, names, ceiling=limit, sizes=sizes, trained=trained or None),
        evaluated=Counter(errors.categories.values()),
    )


def _panoptic_facts(
    name: str,
    evaluator: PanopticEvaluator,
    summary: Mapping[str, Any],
    confusion: SegmentConfusion,
    ceiling: PanopticErrors,
) -> RunFacts:
    categories = evaluator.truth.categories
    names = dict(zip((x.id for x in categories), distinct_names([x.name for x in categories]), strict=True))
    errors = _losses(evaluator, confusion)
    qualities = {i: sum(evaluator.counts_of(i).values(), Counts()).qualities()["pq"] for i in evaluator.image_ids}
    return RunFacts(
        name,
        summary,
        errors,
        names,
        {image_id: quality for image_id, quality in qualities.items() if quality is not None},
        rank_panoptic(errors, names, ceiling=ceiling),
        evaluated=Counter(errors.numbers),
    )


def _losses(evaluator: PanopticEvaluator, confusion: SegmentConfusion) -> PanopticErrors:
    return find_losses(evaluator.totals(), {x.id: x.is_thing for x in evaluator.truth.categories}, confusion)


def complete_truth(truth: GroundTruth) -> COCO:
    """The annotations as pycocotools' index, with the keys that it needs and hand-made files often lack.

    They are numbered from 1: pycocotools stores ids as float64, too coarse for large ones, and reads 0 as no match.
    """
    coco = COCO()
    annotations = (x for category in truth.categories for x in truth.annotations(category))
    coco.dataset = {
        "info": {},
        "images": [*truth.images.values()],
        "categories": [*truth.categories.values()],
        "annotations": [{**x, "id": number} for number, x in enumerate(annotations, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def input_sizes(truth: COCO, config: Config) -> dict[int, Size]:
    """Annotation id -> its size in the network's input and in cells of its grid."""
    model, sizes = config.model, {}
    long, short = model.input_scale
    images = {i: (image["height"], image["width"]) for i, image in truth.imgs.items()}
    inputs = {i: resized_size(size, long=long, short=short) for i, size in images.items()}
    for x in truth.dataset["annotations"]:
        image, shown = images[x["image_id"]], inputs[x["image_id"]]
        _, _, width, height = x["bbox"]
        factor = shown[0] / image[0]
        box = float(np.sqrt(width * height)) * factor
        levels = zip(model.grid_sizes, model.scale_ranges, strict=True)
        grids = [size for size, (low, high) in levels if low <= box <= high] or [max(model.grid_sizes)]
        sizes[x["id"]] = Size(float(np.sqrt(x["area"])) * factor, box * max(grids) / max(padded_size(shown)))
    return sizes


def image_qualities(errors: Errors, truth: COCO) -> dict[ImageId, float]:
    """Per image, at the threshold with the best F1: the IoU of its matches by their number and half of the other
    instances on both sides, as in PQ."""
    threshold, _ = operating_points(errors).best()
    counts: dict[ImageId, Counts] = {}
    for number in errors.categories:
        image_id = truth.anns[number]["image_id"]
        counts[image_id] = counts.get(image_id, Counts()) + Counts(fn=1)
    for x in errors.predictions:
        if x.kind != IGNORED and x.score >= threshold:
            own = Counts(x.iou, tp=1, fn=-1) if x.kind == FOUND else Counts(fp=1)
            counts[x.image_id] = counts.get(x.image_id, Counts()) + own
    qualities = {image_id: own.qualities()["pq"] for image_id, own in counts.items()}
    return {image_id: quality for image_id, quality in qualities.items() if quality is not None}


def _speed(evaluated: Evaluated, compute: Compute, log: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the log says about training, and what this evaluation took."""
    images, model = len(evaluated.subject.dataset), evaluated.subject.model
    facts = {}
    if model is not None:
        facts["parameters"] = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    epochs = [row for row in log if row.get("kind") == "epoch"]
    keys = ("images_per_second", "seconds")
    rates, seconds = ([row[key] for row in epochs if is_number(row.get(key))] for key in keys)
    if rates and seconds:
        facts["training"] = f"{median(rates):.1f} images/s, median of the epochs"
        facts["training time"] = f"{sum(seconds) / 60:.1f} min, {count(len(seconds), 'epoch')}"
    facts["evaluation"] = (
        f"{images / evaluated.seconds:.1f} images/s with loading, masks and AP ({images:,} images, "
        f"{compute.precision}, {compute.device})"
    )
    memory = peak_memory(compute.device)
    if memory is not None:
        facts["peak memory of the process"] = f"{memory:,.0f} MiB"
    return facts


def _environment(row: Mapping[str, Any]) -> dict[str, str]:
    wanted = ("device_name", "cpu", "cpu_count", "processes", "system", "python", "torch", "torchvision", "solov2",
              "commit")  # fmt: skip
    return {name.replace("_", " "): str(row[name]) for name in wanted if row.get(name) is not None}
