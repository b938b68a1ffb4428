"""The images that a page shows: the worst and best of a run, or those that two runs differ most on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from solov2.data.annotations import ImageId
from solov2.data.coco import CocoInstances
from solov2.data.image_dataset import ImageDataset
from solov2.data.panoptic import CocoPanoptic
from solov2.evaluation.coco import CocoEvaluator, Predictions
from solov2.evaluation.picture import draw_instance_views, draw_panoptic_pair
from solov2.report.errors import Errors
from solov2.report.facts import Picture, RunFacts
from solov2.report.gather import Evaluated
from solov2.report.scores import operating_points

WORST, BEST = 6, 3  # images that are shown


def choose_images(facts: Sequence[RunFacts]) -> list[tuple[ImageId, str]]:
    """The images to show, and a text about each.

    Of one run, those with the lowest and the highest quality; of two, those on which the second is worse, and better,
    by the largest margin.
    """
    if len(facts) == 1:
        quality = facts[0].quality
        ranked = sorted(quality, key=lambda image_id: quality[image_id])
        chosen = dict.fromkeys([*ranked[:WORST], *ranked[::-1][:BEST]])  # each once, if there are few
        return [(image_id, f"quality {percent(quality[image_id])}") for image_id in chosen]
    before, now = (entry.quality for entry in facts)
    changes = {image_id: now[image_id] - before[image_id] for image_id in before if image_id in now}
    ranked = sorted(changes, key=lambda image_id: changes[image_id])
    worse = [image_id for image_id in ranked if changes[image_id] < 0][:BEST]
    better = [image_id for image_id in reversed(ranked) if changes[image_id] > 0][:BEST]
    return [(i, f"quality {percent(before[i])}, then {percent(now[i])}") for i in (*worse, *better)]


def percent(quality: float) -> str:
    """A fraction as it is shown: "42 %"."""
    return f"{100 * quality:.0f} %"


def draw_pictures(
    evaluated: Sequence[Evaluated], facts: Sequence[RunFacts], chosen: Sequence[tuple[ImageId, str]]
) -> list[Picture]:
    """The chosen images with ground truth and the predictions of each run, in matching colors.

    Predictions of instances are drawn from the threshold with the run's best F1.
    """
    dataset = evaluated[0].subject.dataset
    titles = ["predictions"] if len(facts) == 1 else [entry.name for entry in facts]
    places = {image_id: place for place, image_id in enumerate(dataset.image_ids)}
    pictures = []
    for image_id, text in chosen:
        place = places[image_id]
        views = _panoptic_views(evaluated, place) if isinstance(dataset, CocoPanoptic) else None
        if views is None:
            assert isinstance(dataset, CocoInstances)
            shares = [entry.evaluator for entry in evaluated]
            thresholds = [best_threshold(entry) for entry in facts]
            views = instance_views(dataset, place, shares, thresholds)
        named = list(zip(["ground truth", *titles], views, strict=True))
        pictures.append(Picture(f"{dataset.record(place).file_name}: {text}", named))
    return pictures


def best_threshold(facts: RunFacts) -> float:
    """The score threshold with the best F1, of instances."""
    assert isinstance(facts.errors, Errors)
    return operating_points(facts.errors).best()[0]


def instance_views(
    dataset: CocoInstances, place: int, evaluators: Sequence[Any], thresholds: Sequence[float]
) -> list[Image.Image]:
    """Ground truth and the predictions that evaluators hold of an image, each from its threshold."""
    views: list[Image.Image] = []
    for evaluator, threshold in zip(evaluators, thresholds, strict=True):
        assert isinstance(evaluator, CocoEvaluator)
        found = _result(evaluator.predictions.get(int(dataset.image_ids[place])), dataset, threshold)
        pair = draw_instance_views(
            dataset, place, [found], dataset.class_names, dataset.category_ids, score_threshold=threshold
        )
        views += pair if not views else pair[1:]
    return views


def _result(found: Predictions | None, dataset: ImageDataset, threshold: float) -> Mapping[str, Any]:
    """Stored predictions as a result with the labels of the dataset, from a score on."""
    if found is None:
        return {"labels": np.zeros(0, dtype=np.int64), "scores": np.zeros(0, dtype=np.float32), "masks": []}
    labels = {category: label for label, category in enumerate(dataset.category_ids)}
    rows = np.flatnonzero(found.scores >= threshold)
    return {
        "labels": np.array([labels[category] for category in found.categories[rows].tolist()], dtype=np.int64),
        "scores": found.scores[rows],
        "masks": [{"size": found.size, "counts": found.masks[row]} for row in rows],
    }


def _panoptic_views(evaluated: Sequence[Evaluated], place: int) -> list[Image.Image]:
    """Ground truth and the predictions of each model on an image, predicted again: maps are not kept."""
    views: list[Image.Image] = []
    for entry in evaluated:
        dataset, model = entry.subject.dataset, entry.subject.model
        assert isinstance(dataset, CocoPanoptic) and model is not None
        pair = draw_panoptic_pair(model, dataset, place)
        views += pair if not views else pair[1:]
    return views
