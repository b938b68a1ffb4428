"""Merging instances and stuff: the reference's maps, a slow plain version, and an accelerator's waits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from solov2.ops import merge
from solov2.ops.label_map import label_map
from solov2.ops.masks import encode_rle, segmentation_to_mask
from solov2.ops.merge import merge_planes, merge_segments
from tests.helpers.operations import Waits

CASES = 30


@pytest.fixture(scope="module")
def merges(golden: Path) -> Iterator[list[tuple[dict[str, Any], torch.Tensor, np.ndarray, np.ndarray]]]:
    """(case, logits, label map, panoptic map) of every stored merge."""
    spec = importlib.util.spec_from_file_location("golden_weights", golden / "weights.py")
    assert spec and spec.loader
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    folder = golden.parent / "panoptic" / "golden" / "merge"
    if not folder.is_dir():
        pytest.skip("no reference material at ../shared/panoptic")
    stored, content = np.load(folder / "merge.npz"), json.loads((folder / "merge.json").read_text())
    found = []
    for number, case in enumerate(content["cases"]):
        height, width = (side // 4 for side in case["padded"])
        channels, tag, seed = case["num_stuff"] + 1, case["tag"], content["seed"]
        mix = weights.noise(tag + "/mix", (channels, 9), seed)
        logits = 2 * np.einsum("ck,khw->chw", mix, weights.cosine_basis(9, height, width))
        logits += case["noise"] * weights.noise(tag + "/noise", (channels, height, width), seed)
        maps = (stored[f"{name}_{number:02}"] for name in ("semantic", "panoptic"))
        found.append((case, torch.from_numpy(logits.astype(np.float32)), *maps))
    assert len(found) == CASES
    yield found


def thresholds(case: dict[str, Any]) -> dict[str, Any]:
    return {name: case[name] for name in ("score_threshold", "overlap_threshold", "stuff_area_limit")}


def merge_on_accelerator(instances: dict[str, Any], semantic: torch.Tensor, case: dict[str, Any]) -> np.ndarray:
    """The map of the accelerator's code, on the host."""
    order = instances["scores"].argsort(descending=True, stable=True)
    enough = instances["scores"][order] >= case["score_threshold"]
    limits = case["overlap_threshold"], case["stuff_area_limit"]
    return merge_planes(instances["masks"], order, enough, semantic, case["num_stuff"], *limits)[0]


@pytest.mark.parametrize("number", range(CASES))
def test_the_reference_merges_alike(merges: list[Any], number: int) -> None:
    case, logits, labels, expected = merges[number]
    size = case["original_size"]
    semantic = label_map(logits, tuple(case["size"]), tuple(size))
    assert (semantic.numpy() == labels).all()
    rles = [{"size": size, "counts": counts} for counts in case["masks"]]
    planes = [segmentation_to_mask(rle, tuple(size)).bool() for rle in rles]
    masks = torch.stack(planes) if planes else torch.zeros(0, *size, dtype=torch.bool)
    instances = {"scores": torch.tensor(case["scores"]), "labels": torch.tensor(case["labels"], dtype=torch.long)}
    for kind in (rles, masks):
        result = merge_segments({**instances, "masks": kind}, semantic, case["num_stuff"], **thresholds(case))
        assert result["panoptic_map"].dtype == torch.int32 and (result["panoptic_map"].numpy() == expected).all()
        assert len(result["segments"]) == len(case["segments"])
        for found, wanted in zip(result["segments"], case["segments"]):
            same = ("id", "label", "area", *(("score", "instance") if wanted["isthing"] else ()))
            assert found["is_thing"] == wanted["isthing"] and all(found[key] == wanted[key] for key in same)
    assert (merge_on_accelerator({**instances, "masks": masks}, semantic, case) == expected).all()


def plain_merge(
    instances: dict[str, Any], semantic: np.ndarray, case: dict[str, Any]
) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    """PANOPTIC.md, section 7, word by word: the map and (label, is_thing, instance) of its segments."""
    ids, segments = np.zeros(semantic.shape, int), []
    scores = instances["scores"].numpy()
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if scores[index] < np.float32(case["score_threshold"]):
            break
        mask = instances["masks"][index].numpy()
        area, free = int(mask.sum()), mask & (ids == 0)
        if area == 0 or (area - int(free.sum())) / area > case["overlap_threshold"] or not free.any():
            continue
        segments.append((int(instances["labels"][index]), True, index))
        ids[free] = len(segments)
    for label in range(case["num_stuff"]):
        left = (semantic == label) & (ids == 0)
        if left.any() and left.sum() >= case["stuff_area_limit"]:
            segments.append((label, False, None))
            ids[left] = len(segments)
    return ids, segments


def random_case(rng: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor, dict[str, Any]]:
    """Small rectangles with equal scores, empty masks, and shares and areas right at the limits."""
    height, width, count, stuff = (int(rng.integers(low, high)) for low, high in ((1, 9), (1, 9), (0, 8), (1, 5)))
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        y, x, h, w = (int(rng.integers(0, high)) for high in (height, width, height + 1, width + 1))
        mask[y : y + h, x : x + w] = True
    instances = {
        "scores": torch.from_numpy(rng.choice([0.1, 0.3, 0.5, 0.9], count).astype(np.float32)),
        "labels": torch.from_numpy(rng.integers(0, 3, count)),
        "masks": masks,
    }
    semantic = torch.from_numpy(rng.integers(0, stuff + 1, (height, width)).astype(np.uint8))
    limits = {"score_threshold": 0.3, "overlap_threshold": float(rng.choice([0, 1 / 3, 0.5, 1]))}
    return instances, semantic, {"num_stuff": stuff, "stuff_area_limit": int(rng.integers(0, 12)), **limits}


def test_random_cases_agree_with_the_plain_rule() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        instances, semantic, case = random_case(rng)
        expected, segments = plain_merge(instances, semantic.numpy(), case)
        for masks in (instances["masks"], encode_rle(instances["masks"])):
            result = merge_segments({**instances, "masks": masks}, semantic, case["num_stuff"], **thresholds(case))
            assert (result["panoptic_map"].numpy() == expected).all()
            assert [(s["label"], s["is_thing"], s["instance"]) for s in result["segments"]] == segments
            for segment in result["segments"]:
                rows, columns = np.nonzero(expected == segment["id"])
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                assert segment["area"] == len(rows) and segment["box"] == box
        assert (merge_on_accelerator(instances, semantic, case) == expected).all()


def test_nothing_gives_an_empty_map() -> None:
    instances = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long), "masks": []}
    semantic = torch.full((4, 5), 2, dtype=torch.uint8)
    result = merge_segments(instances, semantic, 2, score_threshold=0.3, overlap_threshold=0.5, stuff_area_limit=0)
    assert result["segments"] == [] and not result["panoptic_map"].any() and result["panoptic_map"].shape == (4, 5)


@pytest.mark.parametrize("count", [1, 20])
def test_an_accelerator_is_waited_for_twice_whatever_the_number_of_instances(count: int) -> None:
    masks = torch.rand(count, 12, 10) > 0.5
    order, enough = torch.arange(count), torch.ones(count, dtype=torch.bool)
    semantic = torch.randint(0, 4, (12, 10), dtype=torch.uint8)
    with Waits() as waits:
        merge_planes(masks, order, enough, semantic, 3, 0.5, 2)
    assert sorted(waits.waits) == ["cpu", "tolist"]


def test_windows_are_drawn_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """RLEs of instances below the threshold are never decoded, and none is decoded as a plane."""
    drawn, draw = [], merge.draw_window
    monkeypatch.setattr(merge, "draw_window", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    masks = torch.zeros(3, 50, 60, dtype=torch.bool)
    masks[:, 10:14, 20:23] = True
    instances = {"scores": torch.tensor([0.9, 0.2, 0.5]), "labels": torch.arange(3), "masks": encode_rle(masks)}
    semantic = torch.zeros(50, 60, dtype=torch.uint8)
    merge_segments(instances, semantic, 1, score_threshold=0.3, overlap_threshold=0.5, stuff_area_limit=1)
    assert [window.shape for window, _ in drawn] == [(3, 4), (3, 4)]
