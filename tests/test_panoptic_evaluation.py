"""Panoptic quality: panopticapi's figures, a plain reference on random maps, and the same bits however it is shared."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.panoptic_files import PanopticTree, paint, segment
from PIL import Image

from solov2.data.panoptic_file import PanopticFile, Segment, open_annotations, open_predictions
from solov2.errors import InputError
from solov2.evaluation.loop import evaluate
from solov2.evaluation.panoptic import PanopticEvaluator, compare_files, format_table, match_segments
from solov2.ops.panoptic import rgb_from_ids

DATA = Path(__file__).parent / "data" / "panoptic"
SUITES = ("main", "only_things", "only_stuff", "nothing_at_all", "ground_truth_as_prediction")


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """86 pairs with panopticapi's figures, written to files: name -> suite, with the two opened files."""
    root = tmp_path_factory.mktemp("quality")
    recorded = json.loads(gzip.decompress((DATA / "quality.json.gz").read_bytes()))
    for name, ids in np.load(DATA / "quality.npz").items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb_from_ids(ids)).save(path)
    for name, suite in recorded.items():
        for side in ("gt", "pred"):
            (root / name / f"{side}.json").write_text(json.dumps(suite[side]))
        suite["truth"] = open_annotations(root / name / "gt.json")
        suite["found"] = open_predictions(root / name / "pred.json", suite["truth"])
    return recorded


def close(value: float | None, expected: float | None) -> bool:
    return value is expected if expected is None else value == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("name", SUITES)
def test_figures_of_panopticapi(suites: dict[str, Any], name: str) -> None:
    suite = suites[name]
    evaluator = compare_files(suite["truth"], suite["found"])
    assert len(evaluator.predictions) == len(suite["images"])
    for image in suite["images"]:
        counts = evaluator.predictions[image["image_id"]]
        assert counts.keys() == {int(key) for key in image["per_category"]}, image["case"]
        for key, (iou, *whole) in image["per_category"].items():
            assert close(counts[int(key)].iou, iou) and [*counts[int(key)][1:]] == whole, image["case"]
    summary = evaluator.summarize(per_class=True)
    ids = {category.name: str(category.id) for category in suite["truth"].categories}
    per_class = suite["result"].get("per_class", {})
    for group in ("all", "things", "stuff"):
        expected = suite["result"][group]
        assert summary[group].keys() == {"pq", "sq", "rq", "n"} and summary[group]["n"] == expected["n"]
        assert all(close(summary[group][figure], expected[figure]) for figure in ("pq", "sq", "rq"))
    for category, figures in summary["per_class"].items():
        expected = per_class.get(ids[category], {"pq": None, "sq": None, "rq": None})
        assert all(close(figures[figure], expected[figure]) for figure in ("pq", "sq", "rq"))


def test_all_pairs_are_recorded(suites: dict[str, Any]) -> None:
    assert sum(len(suite["images"]) for suite in suites.values()) == 86


def slow_reference(truth_map: list, truth: list[Segment], found_map: list, found: dict[int, int]) -> dict[int, list]:
    """Section by section as panopticapi's evaluation describes it, pixel by pixel."""
    places: dict[int, set] = defaultdict(set)
    found_places: dict[int, set] = defaultdict(set)
    for y, (row, found_row) in enumerate(zip(truth_map, found_map)):
        for x, (number, found_number) in enumerate(zip(row, found_row)):
            places[number].add((y, x))
            found_places[found_number].add((y, x))
    result: dict[int, list] = defaultdict(lambda: [0.0, 0, 0, 0])
    hits, found_hits = [], []
    for g in sorted(truth):
        for number in sorted(found):
            both = len(places[g.id] & found_places[number])
            if g.is_crowd or g.category_id != found[number] or not both:
                continue
            union = len(found_places[number]) + g.area - both - len(places[0] & found_places[number])
            if union > 0 and 2 * both > union:
                result[g.category_id][0] += both / union
                result[g.category_id][1] += 1
                hits.append(g.id)
                found_hits.append(number)
    for g in truth:
        if not g.is_crowd and g.id not in hits:
            result[g.category_id][3] += 1
    for number, category in found.items():
        crowds = [g.id for g in truth if g.is_crowd and g.category_id == category]
        hidden = places[0] | (places[crowds[-1]] if crowds else set())
        if number not in found_hits and 2 * len(hidden & found_places[number]) <= len(found_places[number]):
            result[category][2] += 1
    return dict(result)


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, list[Segment], np.ndarray, dict[int, int]]:
    """Small maps of rectangles: void, crowds, unlisted ids, segments without pixels, areas that are not the pixels'."""
    size = rng.integers(3, 9, 2)
    maps = []
    pool = np.array([0, 0, 3, 4, 300, 70000, 2**24 - 1])
    for _ in range(2):
        ids = np.full(size, rng.choice(pool))
        for number in rng.choice(pool, rng.integers(0, 6)):
            y, x = (rng.integers(0, side) for side in size)
            ids[y : y + rng.integers(1, 7), x : x + rng.integers(1, 7)] = number
        maps.append(ids)
    if rng.random() < 0.4:  # close to each other
        maps[1] = np.where(rng.random(size) < 0.8, maps[0], maps[1])
    truth = [
        Segment(
            int(number),
            int(rng.integers(1, 4)),
            bool(rng.random() < 0.25),
            max(0, int((maps[0] == number).sum()) + (int(rng.integers(-3, 4)) if rng.random() < 0.2 else 0)),
            (0, 0, 1, 1),
        )
        for number in rng.permutation(pool[2:])
        if (maps[0] == number).any() == (rng.random() < 0.9)
    ]
    categories = {segment.id: segment.category_id for segment in truth}
    numbers = [number for number in np.unique(maps[1]).tolist() if number and rng.random() < 0.95]
    found = {
        number: categories[number] if number in categories and rng.random() < 0.7 else int(rng.integers(1, 4))
        for number in numbers
    }
    return maps[0].astype(np.int32), truth, maps[1].astype(np.int32), found


def test_random_maps_against_a_plain_reference() -> None:
    rng = np.random.default_rng(20261127)
    seen = np.zeros(4)
    for case in range(1000):
        truth_map, truth, found_map, found = random_case(rng)
        counts = match_segments(truth_map, truth, found_map, found)
        expected = slow_reference(truth_map.tolist(), truth, found_map.tolist(), found)
        assert {category: list(values) for category, values in counts.items()} == expected, case
        seen += np.array([list(values) for values in expected.values()]).reshape(-1, 4).sum(0)
    assert (seen > 300).all()


def one_pair(truth: list[Segment], found: dict[int, int], rows: list[tuple[int, int]]) -> dict[int, tuple]:
    """Counts of a pair of maps given as rows of pixels (id of the truth, id found)."""
    truth_map, found_map = np.array([rows]).transpose(2, 0, 1).astype(np.int32)
    return {key: tuple(value) for key, value in match_segments(truth_map, truth, found_map, found).items()}


def thing(number: int, area: float, *, crowd: bool = False, category: int = 1) -> Segment:
    return Segment(number, category, crowd, area, (0, 0, 1, 1))


def test_rules_at_their_edges() -> None:
    assert one_pair([thing(1, 4)], {7: 1}, [(1, 7)] * 2 + [(1, 0)] * 2) == {1: (0, 0, 1, 1)}  # IoU of exactly a half
    assert one_pair([thing(1, 3)], {7: 1}, [(1, 7)] * 2 + [(1, 0)]) == {1: (2 / 3, 1, 0, 0)}
    assert one_pair([thing(1, 5)], {7: 1}, [(1, 7)] * 2 + [(1, 0)]) == {1: (0, 0, 1, 1)}  # the area of the file counts
    assert one_pair([thing(1, 2)], {7: 1}, [(1, 7)] * 2 + [(0, 7)] * 9) == {1: (1, 1, 0, 0)}  # void leaves the union
    assert one_pair([thing(1, 2)], {7: 1}, [(1, 7)] * 2 + [(5, 7)] * 9) == {
        1: (0, 0, 1, 1)
    }  # an unlisted id stays in it
    assert one_pair([], {7: 1}, [(0, 7)] * 2 + [(5, 7)] * 2) == {1: (0, 0, 1, 0)}  # exactly half in void
    assert one_pair([], {7: 1}, [(0, 7)] * 3 + [(5, 7)] * 2) == {}
    crowds = [thing(1, 3, crowd=True), thing(2, 3, crowd=True)]
    assert one_pair(crowds, {7: 1}, [(1, 7)] * 3) == {1: (0, 0, 1, 0)}  # only the last crowd hides predictions
    assert one_pair(crowds, {7: 1}, [(2, 7)] * 3) == one_pair(crowds[::-1], {7: 1}, [(1, 7)] * 3) == {}
    assert one_pair([thing(1, 3, crowd=True, category=2)], {7: 1}, [(1, 7)] * 3) == {1: (0, 0, 1, 0)}
    assert one_pair([thing(1, 0)], {}, [(0, 0)]) == {1: (0, 0, 0, 1)}  # a segment without a pixel is missed
    assert one_pair([thing(1, -1)], {7: 1}, [(1, 7)]) == {1: (0, 0, 1, 1)}  # the union would be 0 or less


@pytest.fixture
def tree(tmp_path: Path) -> PanopticTree:
    return PanopticTree(tmp_path)


THINGS, STUFF = [4, 9], [2, 11, 20]  # category ids by label


def results_of(truth: PanopticFile, image_ids: list) -> list[dict[str, Any]]:
    """The ground truth as results, without crowds."""
    results = []
    for image_id in image_ids:
        ids = torch.from_numpy(truth.read_map(image_id))
        segments = []
        for each in truth[image_id].segments:
            if each.is_crowd:
                ids[ids == each.id] = 0
            else:
                is_thing = each.category_id in THINGS
                label = (THINGS if is_thing else STUFF).index(each.category_id)
                segments.append({"id": each.id, "label": label, "is_thing": is_thing})
        results.append({"panoptic_map": ids, "segments": segments})
    return results


def test_ground_truth_as_results(tree: PanopticTree) -> None:
    truth = open_annotations(tree.file)
    evaluator = PanopticEvaluator(truth, THINGS, STUFF)
    evaluator.update([1, 2, 3], results_of(truth, [1, 2, 3]))
    summary = evaluator.summarize(per_class=True)
    assert [summary[group] for group in ("all", "things", "stuff")] == [
        {"pq": 1, "sq": 1, "rq": 1, "n": number} for number in (5, 2, 3)
    ]
    assert [*summary["per_class"]] == ["bus", "road", "car", "sky", "grass"]
    assert summary["per_class"]["bus"] == {"pq": 1, "sq": 1, "rq": 1, "tp": 1, "fp": 0, "fn": 0}
    lines = format_table(summary).splitlines()
    assert lines[0].split() == ["PQ", "SQ", "RQ", "N"] and lines[2].split() == ["Things", *["100.0"] * 3, "2"]
    assert lines[-1].split() == ["grass", "100.0", "100.0", "100.0", "1", "0", "0"]


def test_images_without_results_and_subsets(tree: PanopticTree) -> None:
    truth = open_annotations(tree.file)
    nothing = PanopticEvaluator(truth, THINGS, STUFF)
    summary = nothing.summarize(per_class=True)
    assert summary["all"] == {"pq": 0, "sq": 0, "rq": 0, "n": 5}
    assert summary["per_class"]["bus"]["fn"] == 1  # the crowd is not missed
    only = PanopticEvaluator(truth, THINGS, STUFF, image_ids=[2])
    only.update([1, 2], results_of(truth, [1, 2]))
    assert only.image_ids == [2] and [*only.predictions] == [2]
    summary = only.summarize()
    assert summary["things"] == {"pq": None, "sq": None, "rq": None, "n": 0} and summary["stuff"]["pq"] == 1
    assert json.loads(json.dumps(summary)) == summary
    assert "-" in format_table(summary).splitlines()[2].split()
    with pytest.raises(InputError, match="4"):
        PanopticEvaluator(truth, THINGS, STUFF, image_ids=[1, 4])
    with pytest.raises(InputError, match="'1'"):
        only.update(["1"], results_of(truth, [1]))
    with pytest.raises(InputError, match="77"):
        PanopticEvaluator(truth, [4, 77], STUFF)
    with pytest.raises(InputError, match="stuff label 3 of image 1"):
        bad = results_of(truth, [1])
        bad[0]["segments"][-1]["label"] = 3
        PanopticEvaluator(truth, THINGS, STUFF).update([1], bad)


def test_predictions_of_classes_that_the_file_lacks_are_dropped(tree: PanopticTree) -> None:
    truth = open_annotations(tree.file)
    evaluator = PanopticEvaluator(truth, [4, None], STUFF)
    evaluator.update([3], results_of(truth, [3]))
    assert {key: tuple(value) for key, value in evaluator.predictions[3].items()} == {9: (0, 0, 0, 1)}


class Replay:
    """Stands in for a predictor: batches carry their results."""

    def launch(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def collect(self) -> list[dict[str, Any]]:
        return self.batch["results"]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_same_bits_for_any_number_of_processes(suites: dict[str, Any], shards: int) -> None:
    truth, found = suites["main"]["truth"], suites["main"]["found"]
    whole = compare_files(truth, found)
    things = sorted(category.id for category in truth.categories if category.is_thing)
    stuff = sorted(category.id for category in truth.categories if not category.is_thing)
    batches = []
    for image_id in truth.image_ids:
        segments = [
            {"id": each.id, "is_thing": each.category_id in things,
             "label": (things if each.category_id in things else stuff).index(each.category_id)}
            for each in found[image_id].segments
        ]  # fmt: skip
        result = {"panoptic_map": torch.from_numpy(found.read_map(image_id)), "segments": segments}
        batches.append({"image_ids": [image_id], "results": [result]})
    evaluators = [PanopticEvaluator(truth, things, stuff) for _ in range(shards)]
    for rank, evaluator in enumerate(evaluators):
        evaluate(Replay(), batches[rank::shards][::-1], evaluator)
    evaluators[0].merge([evaluator.predictions for evaluator in evaluators])
    assert evaluators[0].summarize(per_class=True) == whole.summarize(per_class=True)


def test_files_that_contradict_themselves(tree: PanopticTree, tmp_path: Path) -> None:
    truth = open_annotations(tree.file)
    folder = tmp_path / "found"
    folder.mkdir()
    found = [segment(70001, 4, (4, 4, 20, 12)), segment(9, 9, (30, 4, 10, 8))]

    def compare(infos: list[dict], ids: np.ndarray) -> None:
        for number in (1, 2, 3):
            Image.fromarray(rgb_from_ids(ids)).save(folder / f"{number}.png")
        annotations = [{"image_id": n, "file_name": f"{n}.png", "segments_info": infos} for n in (1, 2, 3)]
        (tmp_path / "found.json").write_text(json.dumps({"annotations": annotations}))
        compare_files(truth, open_predictions(tmp_path / "found.json", truth))

    compare(found, paint(found))
    swapped = paint([segment(0x711101, 4, (4, 4, 20, 12)), segment(9 << 16, 9, (30, 4, 10, 8))])
    for infos, ids, named in (
        (found[:1], paint(found), "1.png .* segment 9"),
        (found, paint(found[1:]), "segment 70001.*1.png"),
        (found, swapped, "1.png .*red and blue"),
        (found, paint(found)[:40], "1.png .*64 x 40.*64 x 48"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=named):
            compare(infos, ids)
