"""From raw outputs to instances: the reference's cases, and the contract on order, limits, memory and empty results."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.operations import Waits
from helpers.parity import (
    POSTPROCESS_CASES,
    assert_same_instances,
    postprocess_case,
    postprocess_settings,
    raw_outputs,
)
from torch.utils._python_dispatch import TorchDispatchMode

from solov2.models.postprocess import (
    CELL_CHUNK,
    Candidates,
    PostprocessSettings,
    apply_kernels,
    flatten_raw,
    postprocess,
    select_candidates,
    suppress,
    suppress_neighbors,
)
from solov2.ops.masks import decode_rle
from solov2.ops.resample import MaskResampler


def test_all_cases_are_present() -> None:
    assert len(POSTPROCESS_CASES) == 21


@pytest.mark.parametrize("name", POSTPROCESS_CASES)
def test_instances_in_float64(name: str) -> None:
    """Everything is equal, except that the reference's decay is float32 even here: scores differ by up to 3e-8."""
    case = POSTPROCESS_CASES[name]
    for result, expected in zip(postprocess_case(case, torch.float64), case["results"], strict=True):
        assert_same_instances(result, expected, score_tolerance=5e-8)


@pytest.mark.parametrize("name", POSTPROCESS_CASES)
def test_instances_in_float32(name: str) -> None:
    """The reference differs from itself by one pixel in one mask, and more in the scores of suppressed instances."""
    case = POSTPROCESS_CASES[name]
    tolerance = 2e-7 + 1.1 * case["float32"]["max_score_diff"]
    for result, expected in zip(postprocess_case(case), case["results"], strict=True):
        assert_same_instances(result, expected, score_tolerance=tolerance, pixels=1)
        assert result["scores"].dtype == result["boxes"].dtype == torch.float32


@pytest.mark.parametrize("name", POSTPROCESS_CASES)
def test_candidate_counts(name: str) -> None:
    """(cell, class) pairs after points NMS, and how many of their masks pass the area filter."""
    case = POSTPROCESS_CASES[name]
    raw = raw_outputs(case["tag"], case["params"], torch.float64)
    settings = replace(postprocess_settings(case), max_candidates=0)
    scores, kernels, thresholds = flatten_raw(raw, settings)
    for image, expected in enumerate(case["results"]):
        assert (scores[image] > settings.category_threshold).sum() == expected["n_candidates"]
        found = select_candidates(scores[image], kernels[image], raw["mask_features"][image], thresholds, settings)
        assert len(found.scores) == len(found.masks) == expected["n_after_area"]
        assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("limit", [1, 37, 500, 2000])
def test_chunked_candidates_equal_the_full_list(limit: int) -> None:
    """The search stops early, and finds the beginning of the full list."""
    case = POSTPROCESS_CASES["over_500"]
    raw = raw_outputs(case["tag"], case["params"], torch.float64)
    (scores,), (kernels,), thresholds = flatten_raw(raw, PostprocessSettings())
    assert (scores.amax(1) > 0.1).sum() > 2 * CELL_CHUNK
    arguments = scores, kernels, raw["mask_features"][0], thresholds
    everything = select_candidates(*arguments, PostprocessSettings(max_candidates=0))
    found = select_candidates(*arguments, PostprocessSettings(max_candidates=limit))
    for name in ("scores", "labels", "cells", "masks"):
        assert torch.equal(getattr(found, name), getattr(everything, name)[:limit])
    own = apply_kernels(kernels[found.cells], arguments[2]) > 0.5
    assert torch.equal(own, found.masks.flatten(1))


def equal_candidates(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `select_candidates` with many equal scores, whose probabilities 0, 0.5 and 1 are summed exactly."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 12, (300, 5), generator=generator) / 12
    kernels = torch.eye(6)[torch.randint(0, 6, (300,), generator=generator)]
    features = 200.0 * torch.randint(-1, 2, (6, 9, 7), generator=generator)
    return scores, kernels, features, torch.randint(10, 45, (300,), generator=generator).float()


@pytest.mark.parametrize("limit", [0, 1, 100, 700])
@pytest.mark.parametrize("seed", [0, 1])
def test_candidates_of_equal_score_come_in_the_order_of_cells_and_classes(
    limit: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when all pairs are sorted at once; the size of chunks changes the scores of no candidate."""
    scores, kernels, features, thresholds = equal_candidates(seed)
    settings = PostprocessSettings(max_candidates=limit, category_threshold=0.2, mask_threshold=0.4)
    soft = (kernels @ features.flatten(1)).sigmoid()
    masks = soft > 0.4
    areas = masks.sum(1)
    maskness = torch.where(areas > thresholds, (soft * masks).sum(1) / areas, 0)
    cells, labels = ((scores > 0.2) & (maskness > 0)[:, None]).nonzero(as_tuple=True)
    wanted = scores[cells, labels] * maskness[cells]
    order = wanted.argsort(descending=True, stable=True)[: limit or None]
    found = select_candidates(scores, kernels, features, thresholds, settings)
    assert len(wanted) > 500 and len(wanted.unique()) < 100
    for value, expected in (
        (found.scores, wanted),
        (found.labels, labels),
        (found.cells, cells),
        (found.masks.flatten(1), masks[cells]),
    ):
        assert torch.equal(value, expected[order])
    monkeypatch.setattr("solov2.models.postprocess.CELL_CHUNK", 70)
    chunked = select_candidates(scores, kernels, features, thresholds, settings)
    assert torch.equal(chunked.scores, found.scores)
    assert torch.equal(chunked.masks.flatten(1), masks[chunked.cells])
    assert torch.equal(scores[chunked.cells, chunked.labels] * maskness[chunked.cells], chunked.scores)


@pytest.mark.parametrize(("chunk", "limit", "waits"), [(10**6, 500, 3), (500, 500, 4), (500, 0, 6), (500, 1, 3)])
def test_the_host_waits_for_an_accelerator_once_per_chunk(
    chunk: int, limit: int, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for the numbers of cells and of instances; 1,901 cells pass. Intersections are those of accelerators."""

    def product(masks: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
        return masks.flatten(1).float() @ masks.flatten(1).float().T

    case = POSTPROCESS_CASES["over_500"]
    raw = raw_outputs(case["tag"], case["params"], torch.float64)
    settings = PostprocessSettings(max_candidates=limit)
    (scores,), (kernels,), thresholds = flatten_raw(raw, settings)
    monkeypatch.setattr("solov2.ops.matrix_nms._intersections", product)
    monkeypatch.setattr("solov2.models.postprocess.CELL_CHUNK", chunk)
    with Waits() as seen:
        candidates = select_candidates(scores, kernels, raw["mask_features"][0], thresholds, settings)
        kept = suppress(candidates, settings)
    assert isinstance(kept, Candidates) and len(kept.scores) > 0
    assert len(seen.waits) == waits, seen.waits


@pytest.mark.parametrize(("mask_format", "waits"), [("bool", 4), ("rle", 6)])
def test_waits_of_the_whole_post_processing(mask_format: str, waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per image, in the forms for accelerators: RLEs take one more, and the copy of their borders."""
    monkeypatch.setattr(
        "solov2.ops.matrix_nms._intersections", lambda masks, _: masks.flatten(1).float() @ masks.flatten(1).float().T
    )
    monkeypatch.setattr(MaskResampler, "to_masks", MaskResampler.planes_to_masks)
    monkeypatch.setattr(MaskResampler, "to_rles", MaskResampler.planes_to_rles)
    case = POSTPROCESS_CASES["batch_of_three"]
    with Waits() as seen:
        results = postprocess_case(case, mask_format=mask_format)
    assert len(results) == 3 and len(seen.waits) <= 3 * waits, seen.waits


@pytest.mark.parametrize("max_candidates", [500, 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["nothing_passes", "all_masks_too_small"])
def test_nothing_found(name: str, dtype: torch.dtype, max_candidates: int) -> None:
    case = POSTPROCESS_CASES[name]
    raw = raw_outputs(case["tag"], case["params"], dtype)
    settings = replace(postprocess_settings(case), max_candidates=max_candidates)
    (result,) = postprocess(raw, [(150, 200)], [(300, 401)], settings)
    wide = torch.promote_types(dtype, torch.float32)
    assert result["scores"].shape == (0,) and result["scores"].dtype == wide
    assert result["labels"].shape == (0,) and result["labels"].dtype == torch.int64
    assert result["masks"].shape == (0, 300, 401) and result["masks"].dtype == torch.bool
    assert result["boxes"].shape == (0, 4) and result["boxes"].dtype == torch.float32
    (runs,) = postprocess(raw, [(150, 200)], [(300, 401)], settings, mask_format="rle")
    assert runs["masks"] == [] and runs["boxes"].shape == (0, 4)


def test_rles_equal_the_masks() -> None:
    for name in ("batch_of_three", "grid_corners"):
        full, encoded = (postprocess_case(POSTPROCESS_CASES[name], mask_format=form) for form in ("bool", "rle"))
        for plain, rle in zip(full, encoded, strict=True):
            for key in ("scores", "labels", "boxes"):
                assert torch.equal(plain[key], rle[key])
            assert torch.equal(torch.stack([decode_rle(item) for item in rle["masks"]]).bool(), plain["masks"])


def test_results_are_sorted_and_tight() -> None:
    case = POSTPROCESS_CASES["batch_of_three"]
    for result, meta in zip(postprocess_case(case), case["metas"], strict=True):
        assert (result["scores"].diff() <= 0).all()
        assert result["masks"].shape[1:] == tuple(meta["ori_shape"])
        for mask, (x1, y1, x2, y2) in zip(result["masks"], result["boxes"].int().tolist()):
            if not mask.any():  # its pixels lay in the padding
                assert (x1, y1, x2, y2) == (0, 0, 0, 0)
                continue
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            assert mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any() and mask[:, x2 - 1].any()


def test_a_batch_gives_the_results_of_its_images() -> None:
    case = POSTPROCESS_CASES["batch_of_three"]
    raw, together = raw_outputs(case["tag"], case["params"], torch.float64), postprocess_case(case, torch.float64)
    for image, (result, meta) in enumerate(zip(together, case["metas"], strict=True)):
        own = {
            key: [level[image : image + 1] for level in value] if isinstance(value, list) else value[image : image + 1]
            for key, value in raw.items()
        }
        sizes = (torch.tensor([meta[key]]) for key in ("img_shape", "ori_shape"))
        (alone,) = postprocess(own, *sizes, postprocess_settings(case))
        for key in alone:
            assert torch.equal(alone[key], result[key])


def test_thresholds_and_limits() -> None:
    case = POSTPROCESS_CASES["normal"]
    (everything,) = postprocess_case(case)
    raw = raw_outputs(case["tag"], case["params"], torch.float32)
    threshold = everything["scores"][30].item()
    (high,) = postprocess(raw, [(160, 224)], [(160, 224)], PostprocessSettings(score_threshold=threshold))
    assert torch.equal(high["scores"], everything["scores"][:31])  # the threshold itself passes
    (few,) = postprocess(raw, [(160, 224)], [(160, 224)], PostprocessSettings(max_instances=7))
    for key in ("scores", "labels", "masks", "boxes"):
        assert torch.equal(few[key], everything[key][:7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    case = POSTPROCESS_CASES["normal"]
    half = raw_outputs(case["tag"], case["params"], dtype)
    wide = {
        key: [level.float() for level in value] if isinstance(value, list) else value.float()
        for key, value in half.items()
    }
    arguments = [(160, 224)], [(200, 300)], PostprocessSettings()
    (wanted,), (result,) = postprocess(wide, *arguments), postprocess(half, *arguments)
    with torch.autocast("cpu", dtype=dtype):
        (under_autocast,) = postprocess(half, *arguments)
    assert wanted["scores"].dtype == torch.float32 and len(wanted["scores"]) > 50
    for key in wanted:
        assert torch.equal(result[key], wanted[key]) and torch.equal(under_autocast[key], wanted[key])


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor created inside."""

    max_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.max_bytes = max(self.max_bytes, value.untyped_storage().nbytes())
        return result


def test_every_cell_and_class_above_the_threshold() -> None:
    """3,872 cells times 80 classes: their masks together would take 5 GB, but no tensor here exceeds 32 MiB."""
    generator = torch.Generator().manual_seed(0)
    grids = (40, 36, 24, 16, 12)
    raw = {
        "category_logits": [torch.full((1, 80, size, size), 3.0) for size in grids],
        "kernels": [torch.randn(1, 8, size, size, generator=generator) for size in grids],
        "mask_features": torch.randn(1, 8, 64, 64, generator=generator),
    }
    with LargestTensor() as memory:
        (result,) = postprocess(raw, [(256, 256)], [(256, 256)], PostprocessSettings())
    assert len(result["scores"]) == 100
    assert memory.max_bytes <= 2**25


def test_final_masks_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk sizes affect nothing but memory."""
    whole = postprocess_case(POSTPROCESS_CASES["crop_up"], torch.float64)[0]
    monkeypatch.setattr("solov2.models.postprocess.CELL_CHUNK", 3)
    monkeypatch.setattr("solov2.ops.resample.ROW_CHUNK", 7)
    chunked = postprocess_case(POSTPROCESS_CASES["crop_up"], torch.float64)[0]
    assert all(torch.equal(whole[key], chunked[key]) for key in ("scores", "labels", "masks", "boxes"))


def test_duplicates_with_the_linear_kernel() -> None:
    """Of identical masks of one class one remains and nothing is NaN, even without a score threshold."""
    case = POSTPROCESS_CASES["duplicates_linear"]
    raw = raw_outputs(case["tag"], case["params"], torch.float32)
    (result,) = postprocess(
        raw, [(160, 224)], [(160, 224)], PostprocessSettings(nms_kernel="linear", score_threshold=0.0)
    )
    assert torch.isfinite(result["scores"]).all()
    assert (result["scores"] == 0).sum() == 3


def test_points_nms() -> None:
    """A score survives unless its upper, left or upper-left neighbor is higher; ties survive."""
    scores = torch.tensor([[0.5, 0.5, 0.4], [0.6, 0.5, 0.7], [0.1, 0.6, 0.7]])
    kept = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    assert torch.equal(suppress_neighbors(scores[None, None])[0, 0], scores * kept)


def test_raw_outputs_are_left_untouched() -> None:
    case = POSTPROCESS_CASES["normal"]
    raw, fresh = (raw_outputs(case["tag"], case["params"], torch.float32) for _ in range(2))
    postprocess(raw, [(160, 224)], [(160, 224)], PostprocessSettings())
    assert torch.equal(raw["mask_features"], fresh["mask_features"])
    for key in ("category_logits", "kernels"):
        assert all(torch.equal(one, other) for one, other in zip(raw[key], fresh[key], strict=True))


def test_unknown_mask_format() -> None:
    with pytest.raises(ValueError, match="mask_format .*'polygon'"):
        postprocess_case(POSTPROCESS_CASES["exactly_one"], mask_format="polygon")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_with_every_cell_and_class_above_the_threshold(repo_root: Path) -> None:
    """In its own process, 100 instances at 480 x 640 (31 MB) take 60 MB; a mask per candidate would take 1,269 MB."""
    script = repo_root / "tests" / "scripts" / "postprocess_memory.py"
    command = [sys.executable, str(script), "--size", "256", "256", "--channels", "32", "--original", "480", "640"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "100 instances" in printed and int(printed.split()[0]) < 200, printed
