"""Losses of panoptic quality: planted errors are found, and repairing a kind gives the PQ that is stated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import panoptic_files

from solov2.data.panoptic_file import open_annotations
from solov2.evaluation.panoptic import Counts, PanopticEvaluator
from solov2.report.panoptic_errors import SegmentConfusion, find_losses, stuff_confusion
from solov2.report.ranking import rank_panoptic

NAMES = {1: "cat", 2: "dog", 11: "sky", 12: "road"}
IS_THING = {1: True, 2: True, 11: False, 12: False}
SWAPPED = {(1, 2): [0.9] * 10, (2, 1): [0.9] * 10}
UNEVEN = {(1, 2): [0.9] * 10, (2, 1): [0.9] * 3}  # exchanged, too: one class is rarer
ONE_WAY = {(1, 2): [0.9] * 10}
PERFECT = {1: Counts(10.0, 10), 2: Counts(10.0, 10), 11: Counts(5.0, 5), 12: Counts(5.0, 5)}


def test_kinds_of_losses() -> None:
    """Ten cats: two are found as dogs, one is missed; one dog of nothing; outlines of the sky at 0.8."""
    counts = {**PERFECT, 1: Counts(7.0, 7, 0, 3), 2: Counts(10.0, 10, 3, 0), 11: Counts(4.0, 5)}
    errors = find_losses(counts, IS_THING, SegmentConfusion(mistaken={(1, 2): [0.9, 0.7]}))
    quality = (7 / 8.5 + 10 / 11.5 + 0.8 + 1) / 4
    assert errors.quality == pytest.approx(quality)
    losses = {(loss.kind, loss.group): loss for loss in errors.losses}
    assert {key: loss.number for key, loss in losses.items() if key[0] != "outline"} == {
        ("classification", "things"): 2, ("missed", "things"): 1, ("background", "things"): 1,
    }  # fmt: skip
    repaired = {
        ("classification", "things"): (8.6 / 9.5, 10 / 10.5, 0.8, 1),
        ("missed", "things"): (7 / 8, 10 / 11.5, 0.8, 1),
        ("background", "things"): (7 / 8.5, 10 / 11, 0.8, 1),
        ("outline", "stuff"): (7 / 8.5, 10 / 11.5, 1, 1),
    }
    for key, values in repaired.items():
        assert quality + losses[key].gain == pytest.approx(sum(values) / 4), key
    assert [loss.gain for loss in errors.losses] == sorted((x.gain for x in errors.losses), reverse=True)
    assert (errors.things, errors.stuff, errors.numbers[1]) == ([1, 2], [11, 12], 10)


def test_confusion_is_counted_per_pixel_and_segment(tmp_path: Path) -> None:
    """The bus of image 3 is found as a car, half of the grass of image 2 as sky; void does not count."""
    truth = open_annotations(panoptic_files.PanopticTree(tmp_path).file)
    half = truth.read_map(2)
    half[29:] = np.where(half[29:] > 0, 3, 0)  # 64 x 38 pixels of grass from row 10
    half[:10] = 3
    bus = np.full_like(half, 5)
    bus[10:40, 10:40] = 6
    confusion = SegmentConfusion()
    confusion.add(truth, 2, half, {70001: 11, 3: 20})
    confusion.add(truth, 3, bus, {6: 4})
    assert confusion.pixels == {(11, 11): 64 * 19, (11, 20): 64 * 19, (9, 4): 900}
    assert confusion.mistaken == {(9, 4): [1.0]}  # half of the grass has an IoU of only 0.5
    evaluator = PanopticEvaluator(truth, (4, 9), (2, 11, 20), image_ids=[2, 3])
    evaluator.add(2, half, {70001: 11, 3: 20})
    evaluator.add(3, bus, {6: 4})
    errors = find_losses(evaluator.totals(), {x.id: x.is_thing for x in truth.categories}, confusion)
    rows = dict(zip(errors.stuff, stuff_confusion(errors).tolist()))
    assert rows[11][errors.stuff.index(11)] == rows[11][errors.stuff.index(20)] == 64 * 19 and sum(rows[11]) == 64 * 38
    assert [(x.kind, x.group, x.number) for x in errors.losses if x.kind == "classification"] == [
        ("classification", "things", 1)
    ]
    other = SegmentConfusion()
    other.merge([confusion, confusion])
    assert other.pixels[9, 4] == 1800 and other.mistaken[9, 4] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("counts", "mistaken", "wanted"),
    [
        ({1: Counts(0, 0, 10, 10), 2: Counts(0, 0, 10, 10)}, SWAPPED, ("data", "classification")),
        ({1: Counts(0, 0, 3, 10), 2: Counts(0, 0, 10, 3)}, UNEVEN, ("data", "classification")),
        ({1: Counts(0, 0, 0, 10), 2: Counts(10, 10, 10, 0)}, ONE_WAY, ("training", "classification")),
        ({1: Counts(6, 6, 0, 4)}, {}, ("training", "missed")),
        ({12: Counts(5, 5, 9, 0)}, {}, ("thresholds", "background")),
        ({11: Counts(3, 5)}, {}, ("training", "outline")),
    ],
)  # fmt: skip
def test_ranking(counts: dict, mistaken: dict, wanted: tuple[str, str]) -> None:
    errors = find_losses({**PERFECT, **counts}, IS_THING, SegmentConfusion(mistaken=mistaken))
    ceiling = find_losses({**PERFECT, 1: Counts(9.5, 10)}, IS_THING, SegmentConfusion())
    findings = rank_panoptic(errors, NAMES, ceiling=ceiling)
    assert (findings[0].area, findings[0].kind) == wanted


def test_what_the_targets_lose_is_not_laid_to_training() -> None:
    coarse = {**PERFECT, 1: Counts(4.0, 5, 0, 5), 11: Counts(3.5, 5)}
    errors = find_losses(coarse, IS_THING, SegmentConfusion())
    findings = rank_panoptic(errors, NAMES, ceiling=errors)
    assert [x.area for x in findings] == ["resolution", "grids"]
    assert rank_panoptic(find_losses(PERFECT, IS_THING, SegmentConfusion()), NAMES, ceiling=None) == []
