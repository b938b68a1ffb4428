"""Kinds of errors: planted ones are found, AP50 is pycocotools', and repairing a kind gives what is stated."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from solov2.report.errors import KINDS, average_precision, find_errors

SIZE = 96


def rle(y: int, x: int, height: int = 20, width: int = 20) -> dict[str, Any]:
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[max(0, y) : y + height, max(0, x) : x + width] = 1
    counts = mask_api.encode(mask)
    return {"size": counts["size"], "counts": counts["counts"].decode()}


def scene(seed: int, images: int = 12) -> tuple[COCO, list[dict[str, Any]]]:
    """Four squares of three classes in each image, one of them a crowd in every fourth; and a perfect result."""
    generator = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for number, (y, x) in enumerate(((4, 4), (4, 54), (54, 4), (54, 54))):
            mask, category = rle(y, x), int(generator.integers(1, 4))
            crowd = int(number == 3 and image % 4 == 0)
            box = mask_api.toBbox({**mask, "counts": mask["counts"].encode()}).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": category, "segmentation": mask,
                 "iscrowd": crowd, "area": 400.0, "bbox": box}
            )  # fmt: skip
            if not crowd:
                score = float(generator.uniform(0.5, 1))
                results.append({"image_id": image, "category_id": category, "segmentation": mask, "score": score})
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"c{i}"} for i in (1, 2, 3)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco, results


def shifted(mask: dict[str, Any], pixels: int) -> dict[str, Any]:
    x, y, *_ = mask_api.toBbox({**mask, "counts": mask["counts"].encode()}).astype(int).tolist()
    return rle(y, x + pixels)


def reference_ap50(coco: COCO, results: list[dict[str, Any]]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])


def plant(kind: str, coco: COCO, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results with every third one made wrong."""
    chosen = {id(entry) for entry in results[::3]}
    others = {1: 2, 2: 3, 3: 1}
    if kind == "missed":
        return [entry for entry in results if id(entry) not in chosen]
    found = []
    for entry in results:
        if id(entry) in chosen and kind == "classification":
            entry = {**entry, "category_id": others[entry["category_id"]]}
        if id(entry) in chosen and kind == "localization":
            entry = {**entry, "segmentation": shifted(entry["segmentation"], 9)}  # IoU 0.38
        if id(entry) in chosen and kind == "both":
            moved = shifted(entry["segmentation"], 9)
            entry = {**entry, "segmentation": moved, "category_id": others[entry["category_id"]]}
        found.append(entry)
        if id(entry) in chosen and kind == "duplicate":
            found.append({**entry, "score": entry["score"] - 0.01, "segmentation": shifted(entry["segmentation"], 1)})
        if id(entry) in chosen and kind == "background":
            found.append({**entry, "segmentation": rle(38, 38, 12, 12)})
    return found


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


def test_average_precision() -> None:
    assert average_precision(np.array([0.9, 0.8]), np.array([True, False]), 1) == pytest.approx(1)
    assert average_precision(np.array([0.8, 0.9]), np.array([True, False]), 1) == pytest.approx(0.5)
    assert average_precision(np.zeros(0), np.zeros(0, dtype=bool), 3) == 0
