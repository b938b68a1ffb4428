"""The benchmark command: complete and finite reports, stages that add up, mistakes told in one sentence."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import solov2
from solov2.benchmarking import machine, measure, measure_data, measure_results
from solov2.benchmarking.measure_network import count_candidates, staged_postprocess
from solov2.benchmarking.synthetic import ellipses, synthetic_instances, synthetic_raw
from solov2.commands.benchmark import main

TINY = (
    "--config",
    "quickstart",
    "--size",
    "64",
    "64",
    "--iterations",
    "1",
    "--warmup",
    "0",
    "--candidates",
    "40",
    "--images",
    "2",
    "--device",
    "cpu",
)
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
POSTPROCESS = ["dynamic masks", "matrix NMS", "mask resize", "total"]
INFERENCE = ["preprocess", "backbone", "FPN", "heads", "mask features", *POSTPROCESS]
STAGES = {
    "inference": INFERENCE,
    "inference_optimized": INFERENCE,
    "training": ["targets", "forward", "loss", "backward", "optimizer step", "total"],
    "loading": ["decode", "masks", "resize and flip", "collate and targets", "total"],
    "nms_coco_classes": ["matrix NMS", "total"],
    "nms_one_class": ["matrix NMS", "total"],
    "postprocess": POSTPROCESS,
    "postprocess_rle": POSTPROCESS,
    "evaluation": ["ground truth", "run lengths", "collect", "AP", "total"],
}


@pytest.fixture(scope="module", autouse=True)
def small_sizes_and_a_clock_that_counts() -> Iterator[None]:
    """The sizes that do not follow from the flags are those of real images; these are not. The clock of the stages
    advances by a millisecond whenever it is read."""
    with pytest.MonkeyPatch.context() as patch:
        reads = itertools.count()
        patch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(reads) / 1000))
        patch.setattr(machine, "CONVOLUTIONS", ((1, 8, 8), (3, 8, 16)))
        patch.setattr(machine, "MIN_SECONDS", 0.0)
        patch.setattr(measure_data, "GENERATED_IMAGES", 8)
        patch.setattr(measure_results, "NMS_SIZE", (40, 60))
        patch.setattr(measure_results, "PLANE_SIZE", (48, 64))
        yield


def numbers(value: Any) -> list[float]:
    """All numbers of a nested report."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a tiny run of every mode, with two images per batch."""
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    assert main([*TINY, "--mode", "all", "--batch-size", "2", "--iterations", "3", "--json", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def report(report_file: Path) -> dict[str, Any]:
    return json.loads(report_file.read_text())


def test_report_is_complete_and_finite(report: dict[str, Any]) -> None:
    assert set(report) == {"environment", "settings", "peak", "reports"}
    assert {"device", "device_name", "cpu", "threads", "processes", "torch", "torchvision", "solov2", "commit"} <= set(
        report["environment"]
    )
    [model] = report["reports"]
    assert model["config"] == "quickstart" and model["size"] == [64, 64] and model["batch_size"] == 2
    assert model["precision"] == "float32" and "synthetic" in model
    figures = numbers(report)
    assert len(figures) > 200 and all(math.isfinite(figure) for figure in figures)


@pytest.mark.parametrize("name", STAGES)
def test_stages(report: dict[str, Any], name: str) -> None:
    part = report["reports"][0][name]
    assert list(part["stages"]) == STAGES[name]
    medians = {stage: figures["median_ms"] for stage, figures in part["stages"].items()}
    assert all(median > 0 for median in medians.values())
    total = medians.pop("total")
    assert part["sum_of_stages_ms"] == pytest.approx(sum(medians.values()))
    assert total - part["sum_of_stages_ms"] == pytest.approx(1)  # the clock is read once more at the end
    images = 1 if name.startswith("nms") else 2
    assert part["images_per_second"] == pytest.approx(1000 * images / total)
    assert part["processes"] == 1 and part["peak_memory_mib"] > 50
    assert part["step_memory_mib"] is None or 0 <= part["step_memory_mib"] < part["peak_memory_mib"]


def test_rates_belong_to_the_peak(report: dict[str, Any]) -> None:
    peak, parts = report["peak"], report["reports"][0]
    assert peak["gflop_per_second"] == max(peak["convolutions"].values()) and len(peak["convolutions"]) == 4
    counted = {name for name in STAGES if parts[name]["stages"]["total"]["gflop"] is not None}
    assert counted == set(STAGES) - {"loading", "evaluation"}
    for name in counted:
        stages = parts[name]["stages"]
        own = [figures["gflop"] or 0 for stage, figures in stages.items() if stage != "total"]
        assert stages["total"]["gflop"] == pytest.approx(sum(own))
        for figures in stages.values():
            if figures["gflop"] is None:
                assert figures["gflop_per_second"] is None and figures["share_of_peak"] is None
            else:
                rate = 1000 * figures["gflop"] / figures["median_ms"]
                assert figures["gflop_per_second"] == pytest.approx(rate)
                assert figures["share_of_peak"] == pytest.approx(rate / peak["gflop_per_second"])
    training = parts["training"]["stages"]
    assert 1.5 * training["forward"]["gflop"] < training["backward"]["gflop"] < 2 * training["forward"]["gflop"]


def test_data_post_processing_and_evaluation(report: dict[str, Any]) -> None:
    parts = report["reports"][0]
    assert parts["loading"]["images_per_second_per_worker"] > 0 and parts["loading"]["images"] >= 6
    assert parts["loading"]["source"] == "generated shapes of 64 x 64"
    assert parts["nms_one_class"]["masks"] == parts["nms_coco_classes"]["masks"] == 40
    assert parts["postprocess"]["instances_per_image"] == parts["postprocess_rle"]["instances_per_image"] > 5
    assert parts["evaluation"]["detections"] == 200 and parts["evaluation"]["detections_per_second"] > 0
    assert 0.01 < parts["evaluation"]["mask_AP"] < 1


def test_something_flows_through_every_stage(report: dict[str, Any]) -> None:
    inference, training = report["reports"][0]["inference"], report["reports"][0]["training"]
    assert inference["input_size"] == [64, 64]
    assert 28 <= inference["candidates_per_image"] <= 40  # direct neighbors of one class suppress each other
    assert inference["instances_per_image"] > 5
    assert training["loss_mask"] > 0.1 and training["loss_category"] > 0


def test_table_says_what_is_synthetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--mode", "infer"]) == 0
    output = capsys.readouterr().out
    for text in ("synthetic", "quickstart: 64 x 64", "matrix NMS", "images/s", "candidates", "convolution peak"):
        assert text in output
    assert "training" not in output and output.count("model.optimize()") == 1


def test_training_in_bf16_and_loading_of_files(coco_tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--mode", "train", "--precision", "bf16", "--data-root", str(coco_tree)]) == 0
    output = capsys.readouterr().out
    assert "bf16" in output and f"images/s per worker, {coco_tree}" in output and "inference" not in output


def test_nproc_starts_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def replace_process(_file: str, command: list[str], _environment: dict[str, str]) -> None:
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(os, "execvpe", replace_process)
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    with pytest.raises(SystemExit):
        main([*TINY, "--nproc", "2"])
    assert started[0][1:] == [*LAUNCHER[1:], "benchmark.py", *TINY]


def test_two_processes_train_together(repo_root: Path, report_file: Path, tmp_path: Path) -> None:
    """The images of both over the time of the slower one, told once and compared with one process."""
    path = tmp_path / "two.json"
    command = [*LAUNCHER, "benchmark.py", *TINY, "--batch-size", "2", "--json", str(path)]
    done = subprocess.run(
        [*command, "--compare", str(report_file)],
        cwd=repo_root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("images/s over 2 processes") == 1 and "processes differs: 1 (old), 2 (new)" in done.stdout
    content = json.loads(path.read_text())
    [model] = content["reports"]
    assert content["environment"]["processes"] == 2 and "inference" not in model
    part = model["training"]
    assert list(part["stages"]) == STAGES["training"] and part["processes"] == 2
    assert part["slowest_process_ms"] >= part["stages"]["total"]["median_ms"]
    assert part["images_per_second"] == pytest.approx(1000 * 4 / part["slowest_process_ms"])


@pytest.fixture
def coco_tree(tmp_path: Path) -> Path:
    """A generated data set in COCO's layout."""
    from solov2.config import load_config
    from solov2.data.shapes import generate_shapes

    generate_shapes(tmp_path, train_images=6, val_images=1, size=64, seed=0)
    assert (tmp_path / load_config("quickstart").data.train_annotations).is_file()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100", "64"], "--size must be two multiples of 32, at least 64, got 100 64"),
        (["--size", "32", "32"], "--size must be two multiples of 32, at least 64, got 32 32"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--iterations", "0"], "--iterations must be at least 1, got 0"),
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--mode", "infer", "--data-root", "."], "--data-root measures the loading of training data"),
        (["--mode", "infer", "--nproc", "2"], "several processes measure the training step only"),
        (["--nproc", "2", "--sweep", "batch", "1"], "--sweep measures one process"),
        (["--sweep", "width", "1"], "--sweep must start with one of batch, size, candidates, instances, got 'width'"),
        (["--sweep", "batch"], "--sweep batch needs values, for example: --sweep batch 1 2 4"),
        (["--sweep", "batch", "1", "x"], "--sweep batch takes values like 1 2 4, got 1 x"),
        (["--sweep", "batch", "1", "0"], "--batch-size must be at least 1, got 0"),
        (["--sweep", "size", "64x96x32"], "--sweep size takes values like 448x768 800x1216"),
        (["--sweep", "size", "64", "100"], "--size must be two multiples of 32"),
        (["--sweep", "instances", "8", "--mode", "infer"], "--sweep instances changes nothing in --mode infer"),
        (["--config", "quickstart", "--sweep", "candidates", "10", "5000"], "--candidates 5000 is more than the"),
        (["--compare", "no/such.json"], "--compare no/such.json: No such file"),
        (["--compare", __file__], "is not JSON"),
        (["--compare", "a", "b", "c"], "--compare takes one or two reports, got 3"),
        (["--config", "solov2_r50_1x"], "did you mean"),
        (["--config", "quickstart", "--candidates", "5000"], "--candidates 5000 is more than the"),
        (["--device", "nonsense"], "device 'nonsense' is not usable here"),
        (["--json", __file__], "exists already"),
        (["--data-root", "/nonexistent"], "/nonexistent"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_staged_postprocess_is_postprocess() -> None:
    """The steps that are timed one by one give what the model gives."""
    model = solov2.build_model("quickstart")
    shapes = {"category_logits": 4, "kernels": 64}
    raw = {
        name: [torch.zeros(2, channels, size, size) for size in model.grid_sizes] for name, channels in shapes.items()
    }
    raw["mask_features"] = torch.zeros(2, 64, 24, 32)
    raw = synthetic_raw(raw, 80, torch.Generator().manual_seed(0))
    sizes, original_sizes = torch.tensor([[96, 128], [90, 100]]), torch.tensor([[60, 80], [45, 50]])
    laps: list[str] = []
    staged = staged_postprocess(raw, sizes, original_sizes, model.settings, laps.append)
    assert laps == ["dynamic masks", "matrix NMS", "mask resize"] * 2
    for one, other in zip(staged, model.postprocess(raw, sizes, original_sizes), strict=True):
        assert len(one["scores"]) > 5 and one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synthetic_raw_keeps_shapes_types_and_layout(dtype: torch.dtype) -> None:
    like = {
        "category_logits": [torch.zeros(2, 5, size, size, dtype=dtype) for size in (12, 6)],
        "kernels": [torch.zeros(2, 8, size, size, dtype=dtype) for size in (12, 6)],
        "mask_features": torch.zeros(2, 8, 16, 16, dtype=dtype).to(memory_format=torch.channels_last),
    }
    raw = synthetic_raw(like, 40, torch.Generator().manual_seed(0))
    for key in ("category_logits", "kernels"):
        assert [(x.shape, x.dtype) for x in raw[key]] == [(x.shape, x.dtype) for x in like[key]]
    assert raw["mask_features"].stride() == like["mask_features"].stride()
    assert raw["mask_features"].abs().max() == 8
    assert 2 * 25 <= count_candidates(raw, 0.1) <= 2 * 40
    again = synthetic_raw(like, 40, torch.Generator().manual_seed(0))
    assert torch.equal(raw["mask_features"], again["mask_features"])


def test_synthetic_ground_truth() -> None:
    truth = synthetic_instances(6, (64, 96), 3, torch.Generator().manual_seed(0))
    assert truth["masks"].shape == (6, 64, 96) and truth["masks"].dtype == torch.uint8
    area = truth["masks"].flatten(1).sum(1)
    sides = truth["boxes"][:, 2:] - truth["boxes"][:, :2]
    assert (area > 0).all() and (sides > 0).all() and (area < 64 * 96 / 3).all()
    whole = ellipses(200, 64, 96, torch.Generator().manual_seed(0))
    assert (whole.amax((1, 2)) > 0.9).all() and (whole.amin((1, 2)) < 0).all()
