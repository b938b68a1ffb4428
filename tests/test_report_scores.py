"""Curves, thresholds, calibration and confusion, against pycocotools and counts made by hand."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from helpers.scenes import plant, scene
from pycocotools.cocoeval import COCOeval

from solov2.report.errors import find_errors
from solov2.report.scores import calibration, calibration_error, confusion, mean_precision, operating_points


def test_mean_precision_is_pycocotools() -> None:
    coco, results = scene(3)
    planted = plant("classification", coco, plant("background", coco, results))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes([dict(entry) for entry in planted]), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    wanted = evaluation.eval["precision"][0, :, :, 0, -1].mean(axis=1)
    errors = find_errors(coco, planted)
    np.testing.assert_allclose(mean_precision(errors), wanted, rtol=0, atol=1e-12)
    assert mean_precision(errors).mean() == pytest.approx(errors.ap50)


def test_the_best_threshold() -> None:
    """Wrong predictions score below 0.5, so the threshold is the lowest right score, or just above the wrong ones."""
    coco, results = scene(4)
    noise = [{**plant("background", coco, [entry])[1], "score": 0.4} for entry in results]
    points = operating_points(find_errors(coco, [*results, *noise]))
    threshold, f1 = points.best()
    assert threshold == pytest.approx(min(entry["score"] for entry in results)) and f1 == pytest.approx(1)
    assert points.scores[-1] == 0.4 and points.precision[-1] == pytest.approx(0.5) and points.recall[-1] == 1
    one = operating_points(find_errors(coco, results), category=2)
    assert len(one.scores) == len({entry["score"] for entry in results if entry["category_id"] == 2})
    assert operating_points(find_errors(coco, [])).best() == (0.0, 0.0)


def test_calibration() -> None:
    coco, results = scene(4)
    half = [{**entry, "score": 0.75} for entry in results]
    wrong = [{**plant("background", coco, [entry])[1], "score": 0.75} for entry in results]
    (only,) = calibration(find_errors(coco, [*half, *wrong]))
    assert (only.number, only.score, only.right) == (2 * len(results), 0.75, 0.5)
    assert calibration_error([only]) == 0.25 and calibration_error([]) == 0


def test_confusion() -> None:
    coco, results = scene(4)
    errors = find_errors(coco, results)
    numbers = [list(errors.categories.values()).count(category) for category in (1, 2, 3)]
    assert confusion(errors, [1, 2, 3], 0.0).tolist() == np.diag([*numbers, 0]).tolist()
    swap = {1: 2, 2: 1, 3: 3}
    swapped = find_errors(coco, [{**entry, "category_id": swap[entry["category_id"]]} for entry in results])
    table = confusion(swapped, [1, 2, 3], 0.0)
    assert table[0, 1] == numbers[0] and table[1, 0] == numbers[1] and table[2, 2] == numbers[2]
    assert confusion(errors, [1, 2, 3], 1.1).sum(axis=0).tolist() == [0, 0, 0, len(results)]
    doubled = confusion(find_errors(coco, plant("duplicate", coco, results)), [1, 2, 3], 0.0)
    assert doubled[-1].sum() == len(results[::3]) and doubled[:, -1].sum() == 0


@pytest.mark.parametrize("fault", ["classification", "background", "missed", "localization", "duplicate"])
def test_curves_and_confusion_are_those_of_faster_coco_eval(fault: str) -> None:
    extra = pytest.importorskip("faster_coco_eval.extra", reason="needs faster-coco-eval")
    faster = pytest.importorskip("faster_coco_eval")
    coco, results = scene(5, crowds=False)
    planted = plant(fault, coco, results)
    errors = find_errors(coco, planted)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = faster.COCO(coco.dataset)
        found = truth.loadRes([dict(entry) for entry in planted])
        curves = extra.Curves(truth, found, iouType="segm", iou_tresh=0.5, useCats=True).build_curve("class")
        matrix = extra.PreviewResults(truth, found, iouType="segm", iou_tresh=0.5, min_score=0.6)
    wanted = np.mean([curve["precision_list"] for curve in curves], axis=0)
    np.testing.assert_allclose(mean_precision(errors), wanted, rtol=0, atol=1e-6)
    table, count = confusion(errors, [1, 2, 3], 0.6), matrix.compute_confusion_matrix()  # classes, false, missed
    assert table[:3, :3].tolist() == count[:, :3].tolist()
    assert table[:3, -1].tolist() == count[:, -1].tolist()
    assert table[-1, :3].tolist() == count[:, -2].tolist()
