"""Kinds of errors: planted ones are found, AP50 is pycocotools', and repairing a kind gives what is stated."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
import pytest
from helpers.scenes import plant, scene, shifted
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solov2.evaluation.curves import GroundTruth
from solov2.report.errors import KINDS, excused, find_errors, interpolated_precision
from solov2.report.gather import complete_truth


def reference_ap50(coco: COCO, results: list[dict[str, Any]]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])


def test_a_perfect_result_has_no_errors() -> None:
    coco, results = scene(0)
    errors = find_errors(coco, results)
    assert errors.ap50 == pytest.approx(1) and set(errors.counts().values()) == {0}
    assert all(gain == 0 for gain in errors.gains.values())
    assert sorted(prediction.row for prediction in errors.predictions) == list(range(len(results)))


@pytest.mark.parametrize("kind", KINDS)
def test_planted_errors_are_found(kind: str) -> None:
    """Each as often as it was planted, and repairing it gives back all that was lost."""
    coco, results = scene(1)
    planted = plant(kind, coco, results)
    errors = find_errors(coco, planted)
    number = len(results[::3])
    missed = number if kind == "both" else 0
    assert errors.counts() == dict.fromkeys(KINDS, 0) | {"missed": missed} | {kind: number}
    assert errors.ap50 == pytest.approx(reference_ap50(coco, planted), abs=1e-12) and errors.ap50 < 0.999
    if kind != "both":
        assert errors.ap50 + errors.gains[kind] == pytest.approx(1)
        assert all(gain == pytest.approx(0) for other, gain in errors.gains.items() if other != kind)
    assert all(entry.truth is not None and entry.iou > 0.1 for entry in errors.predictions if entry.kind == kind) or (
        kind in ("background", "missed")
    )


def test_ap50_of_noise_is_pycocotools() -> None:
    """Shifts, classes and scores at random, crowds, several predictions of an instance, equal scores."""
    for seed in range(12):
        coco, results = scene(seed, images=6)
        generator = np.random.default_rng(100 + seed)
        noisy = []
        for entry in [*results, *results]:
            moved = shifted(entry["segmentation"], int(generator.integers(-12, 12)))
            category = entry["category_id"] if generator.random() < 0.7 else int(generator.integers(1, 4))
            score = round(float(generator.random()), 1)
            noisy.append({**entry, "segmentation": moved, "category_id": category, "score": score})
        for limit in (100, 2):
            errors = find_errors(coco, noisy, max_detections=limit)
            if limit == 100:
                assert errors.ap50 == pytest.approx(reference_ap50(coco, noisy), abs=1e-12)
                assert sum(errors.counts().values()) > 0
            assert all(
                gain > -1e-9 for kind, gain in errors.gains.items() if kind in ("duplicate", "background", "both")
            )


@pytest.mark.parametrize(
    ("seed", "ap50", "counts", "gains"),
    [
        (0, 43.8500614767359, (13, 19, 7, 11), (13.2437861325, 16.8418469998, 3.2928370236, 2.2665501844)),
        (1, 36.882785500772314, (4, 32, 8, 8), (3.5875115289, 33.4661065313, 2.8658816736, 3.5278764445)),
    ],
)
def test_numbers_and_gains_are_those_of_tidecv(seed: int, ap50: float, counts: tuple, gains: tuple) -> None:
    """Recorded from tidecv 1.0.1, in percent: classification, localization, both, duplicate; nothing else occurs."""
    coco, results = scene(seed, images=6, crowds=False)
    generator = np.random.default_rng(100 + seed)
    noisy = []
    for entry in [*results, *results, *results]:
        moved = shifted(entry["segmentation"], int(generator.integers(-12, 12)))
        category = entry["category_id"] if generator.random() < 0.7 else int(generator.integers(1, 4))
        score = float(generator.random())
        noisy.append({**entry, "segmentation": moved, "category_id": category, "score": score})
    errors = find_errors(coco, noisy)
    assert 100 * errors.ap50 == pytest.approx(ap50, abs=1e-10)
    assert tuple(errors.counts().values()) == (*counts, 0, 0)
    assert [100 * gain for gain in errors.gains.values()] == pytest.approx([*gains, 0, 0], abs=1e-8)


def test_of_several_predictions_that_would_find_an_instance_one_does() -> None:
    coco, results = scene(2)
    wrong = [{**results[0], "category_id": results[0]["category_id"] % 3 + 1, "score": score} for score in (0.9, 0.8)]
    errors = find_errors(coco, [*wrong, *results[1:]])
    assert errors.counts()["classification"] == 2 and errors.missed == []
    assert errors.ap50 + errors.gains["classification"] == pytest.approx(1)


def test_without_predictions_and_without_ground_truth() -> None:
    coco, results = scene(0)
    nothing = find_errors(coco, [])
    assert nothing.ap50 == 0 and len(nothing.missed) == len(results) and nothing.gains["missed"] == 1
    coco.dataset["annotations"] = []
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    without = find_errors(coco, results)
    assert without.ap50 == -1 and without.counts()["background"] == len(results)


def test_interpolated_precision() -> None:
    assert interpolated_precision(np.array([0.9, 0.8]), np.array([True, False]), 1) == pytest.approx(np.ones(101))
    assert interpolated_precision(np.array([0.8, 0.9]), np.array([True, False]), 1) == pytest.approx(np.full(101, 0.5))
    half = interpolated_precision(np.array([0.9]), np.array([True]), 2)
    assert half == pytest.approx(np.where(np.arange(101) <= 50, 1, 0))
    assert not interpolated_precision(np.zeros(0), np.zeros(0, dtype=bool), 3).any()


@pytest.mark.parametrize("first", [0, 2**53 + 1])
def test_ids_that_pycocotools_cannot_hold(first: int) -> None:
    """It keeps them as float64, so large ones would name other instances or none, and takes 0 for no match."""
    coco, results = scene(2)
    for annotation in coco.dataset["annotations"]:
        annotation["id"] += first - 1
    errors = find_errors(complete_truth(GroundTruth(coco, set(coco.imgs))), results)
    assert set(errors.counts().values()) == {0} and all(x.iou == 1 for x in errors.predictions if x.kind == "found")


def test_instances_that_are_excused() -> None:
    """Found by a wrong prediction if there is one; otherwise they do not count. Any iterable names them."""
    coco, results = scene(1)
    errors = find_errors(coco, plant("classification", coco, plant("missed", coco, results)))
    wrong = {x.truth for x in errors.predictions if x.kind == "classification"}
    found = excused(errors, (number for number in errors.categories if number in wrong))
    assert found.counts() == {**dict.fromkeys(KINDS, 0), "missed": len(errors.missed)}
    assert len(found.categories) == len(errors.categories)
    left = excused(errors, iter(errors.categories))
    assert left.ap50 == pytest.approx(1) and left.missed == []
    assert set(errors.categories) - set(left.categories) == set(errors.missed)
