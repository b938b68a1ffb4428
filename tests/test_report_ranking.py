"""The ranked list names a planted fault first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.scenes import plant, scene, shifted

from solov2.report.errors import find_errors
from solov2.report.ranking import Ceiling, Size, rank

NAMES = {1: "cat", 2: "dog", 3: "owl"}
GOOD = Ceiling(cells=0.01, outlines=0.0, sharpness=0.98)


def first(results: list[dict[str, Any]], coco: Any, **options: Any) -> tuple[str, str]:
    findings = rank(find_errors(coco, results), NAMES, **{"ceiling": GOOD, **options})
    assert [x.gain for x in findings] == sorted((x.gain for x in findings), reverse=True)
    return findings[0].area, findings[0].kind


@pytest.mark.parametrize(
    ("fault", "area"),
    [
        ("localization", "training"),
        ("missed", "training"),
        ("duplicate", "thresholds"),
        ("background", "data"),
        ("classification", "training"),
    ],
)
def test_planted_faults(fault: str, area: str) -> None:
    coco, results = scene(5)
    low = [{**entry, "score": entry["score"] - 0.45} for entry in results]  # as a model whose threshold is low
    assert first(plant(fault, coco, low), coco) == (area, fault)


def test_swapped_classes() -> None:
    coco, results = scene(6)
    swap = {1: 2, 2: 1, 3: 3}
    swapped = [
        {**entry, "category_id": swap[entry["category_id"]], "score": entry["score"] - 0.45} for entry in results
    ]
    findings = rank(find_errors(coco, swapped), NAMES, ceiling=GOOD)
    assert (findings[0].area, findings[0].kind) == ("data", "classification")
    assert "cat" in findings[0].what and "dog" in findings[0].what


def test_classes_off_by_one() -> None:
    """Each is taken for the next: a fault of the ids, and not of the model as when two are taken for the third."""
    coco, results = scene(6)
    low = [{**entry, "score": entry["score"] - 0.45} for entry in results]
    moved = [{**entry, "category_id": entry["category_id"] % 3 + 1} for entry in low]
    assert first(moved, coco) == ("data", "classification")
    assert first([{**entry, "category_id": 3} for entry in low], coco) == ("training", "classification")


def test_objects_without_an_annotation() -> None:
    """Predictions of them score like right ones; a tail of low scores, which all models have, hides that not."""
    coco, results = scene(6)
    low = [{**entry, "score": entry["score"] - 0.45} for entry in results]
    extra = [entry for entry in plant("background", coco, low) if entry not in low]
    tail = [{**extra[0], "image_id": entry["image_id"], "score": 0.01} for entry in [*low, *low]]
    assert first([*low, *extra, *tail], coco) == ("data", "background")
    scores = sorted(entry["score"] for entry in low)
    unsure = [{**entry, "score": scores[len(scores) // 10]} for entry in extra]
    findings = rank(find_errors(coco, [*low, *unsure, *tail]), NAMES, ceiling=GOOD)
    assert [x.area for x in findings if x.kind == "background"] in (["training"], [])


def test_a_threshold_too_high() -> None:
    """Calibrated scores, cut at 0.5: what is missed is attributed to the threshold."""
    coco, results = scene(7, images=40)
    generator = np.random.default_rng(0)
    scored = []
    for entry in results:
        score = float(generator.uniform(0.02, 1))
        scored.append({**entry, "score": score})
        if generator.random() > score:
            scored.append(
                {**entry, "score": score, "segmentation": plant("background", coco, [entry])[1]["segmentation"]}
            )
    assert first([entry for entry in scored if entry["score"] > 0.5], coco) == ("thresholds", "threshold")
    assert first(scored, coco)[0] != "thresholds"


def test_grids_too_coarse() -> None:
    """What the targets cannot hold is not attributed to training."""
    coco, results = scene(8)
    assert first(plant("missed", coco, results), coco, ceiling=Ceiling(0.4, 0.0, 1.0)) == ("grids", "grids")


def test_instances_smaller_than_a_cell() -> None:
    """Their errors are attributed to the grids, whatever kind they have; those of the others are not."""
    coco, results = scene(8)
    errors = find_errors(coco, plant("classification", coco, results))
    wrong = {x.truth for x in errors.predictions if x.kind == "classification"}
    sizes = {number: Size(20.0, 0.8 if number in wrong else 2.0) for number in errors.categories}
    [finding] = rank(errors, NAMES, ceiling=Ceiling(0.0, 0.0, 1.0), sizes=sizes)
    assert (finding.area, finding.kind) == ("grids", "grids") and finding.gain == pytest.approx(1 - errors.ap50)
    large = {number: Size(20.0, 2.0 if number in wrong else 0.8) for number in errors.categories}
    [finding] = rank(errors, NAMES, ceiling=Ceiling(0.0, 0.0, 1.0), sizes=large)
    assert finding.area == "training"


def test_resolution() -> None:
    coco, results = scene(9)
    blurred = Ceiling(0.01, 0.0, 0.5)
    assert first(plant("localization", coco, results), coco, ceiling=blurred) == ("resolution", "localization")
    low = [{**entry, "score": entry["score"] - 0.45} for entry in results]
    sizes = dict.fromkeys((annotation["id"] for annotation in coco.dataset["annotations"]), Size(20.0, 2.0))
    assert first(plant("missed", coco, low), coco, sizes=sizes) == ("resolution", "missed")


def test_nothing_to_mend() -> None:
    coco, results = scene(0)
    assert rank(find_errors(coco, results), NAMES, ceiling=Ceiling(0.0, 0.0, 1.0)) == []


def test_shifted_masks() -> None:
    """All by nine pixels: the common shift is attributed to the data, and named."""
    coco, results = scene(9)
    moved = [
        {**entry, "segmentation": shifted(entry["segmentation"], 9), "score": entry["score"] - 0.45}
        for entry in results
    ]
    findings = rank(find_errors(coco, moved), NAMES, ceiling=GOOD)
    assert (findings[0].area, findings[0].kind) == ("data", "localization") and "9 px to the right" in findings[0].what


def test_missed_classes_with_few_examples() -> None:
    coco, results = scene(9)
    found = [{**entry, "score": entry["score"] - 0.45} for entry in results if entry["category_id"] != 3]
    assert first(found, coco, trained={1: 500, 2: 500, 3: 20}) == ("data", "missed")
    assert first(found, coco, trained={1: 500, 2: 500, 3: 500}) == ("training", "missed")


def test_lower_scores_of_other_classes() -> None:
    """Each instance is found, and also predicted as the next class with a lower score."""
    coco, results = scene(9)
    low = [{**entry, "score": entry["score"] - 0.45} for entry in results]
    more = [{**entry, "category_id": entry["category_id"] % 3 + 1} for entry in low]
    more = [{**entry, "score": entry["score"] / 2} for entry in more]
    findings = rank(find_errors(coco, [*low, *more]), NAMES, ceiling=GOOD)
    assert [(x.area, x.kind) for x in findings if x.kind == "classification"] == [("thresholds", "classification")]
