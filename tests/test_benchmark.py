"""The benchmark command: complete and finite reports, named stages, one-line error messages."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import lively, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from solov2.benchmarking import peak, workloads
from solov2.benchmarking.flops import FORMULAS, OUTSIDE, count_flops
from solov2.commands.benchmark import main
from solov2.data.shapes import generate_shapes
from solov2.models.winograd import WinogradConv2d

TINY = "quickstart --size 64 64 --iterations 1 --warmup 0 --candidates 40 --device cpu".split()
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NETWORK = ["normalize", "backbone", "FPN", "head", "mask features"]
INFERENCE = ["decode", "resize", "pad", *NETWORK, "candidates", "Matrix NMS", "masks", OUTSIDE, "total"]
STAGES = {
    "loading": ["decode", "annotation masks", "transform", "pad", "targets", OUTSIDE, "total"],
    "inference": INFERENCE,
    "optimized_inference": INFERENCE,
    "training": [*NETWORK, "loss", "backward", "update", OUTSIDE, "total"],
}


@pytest.fixture(scope="module", autouse=True)
def small_sizes() -> Iterator[None]:
    """Shrink the sizes that no flag controls and that are otherwise those of real images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak, "CONVOLUTIONS", ((1, 8, 8), (3, 8, 16)))
        patch.setattr(peak, "MIN_SECONDS", 0.0)
        patch.setattr(workloads, "GENERATED_IMAGES", 8)
        patch.setattr(workloads, "MIN_LOADED_BATCHES", 2)
        yield


PANOPTIC = "--set model.num_stuff=3 --set model.semantic_channels=32 --set model.stuff_area_limit=16".split()


def numbers(value: Any) -> list[float]:
    """All numbers of a nested report."""
    if isinstance(value, dict | list):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON report of a tiny run of all modes, with two images per batch."""
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    assert main([*TINY, "--batch-size", "2", "--iterations", "3", "--json", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def report(report_file: Path) -> dict[str, Any]:
    return json.loads(report_file.read_text())


def test_report_is_complete_and_finite(report: dict[str, Any]) -> None:
    assert list(report) == ["environment", "settings", "model", "peak", "parts"] and list(report["parts"]) == [*STAGES]
    assert {"device_name", "threads", "processes", "torch", "solov2", "commit"} <= report["environment"].keys()
    assert report["settings"] == {
        "model": "quickstart", "mode": "all", "size": [64, 64], "precision": "float32", "batch_size": 2,
        "instances": 8, "candidates": 40, "warmup": 0, "data_root": None,
    }  # fmt: skip
    assert report["model"]["num_classes"] == 4
    assert report["peak"]["gflop_per_second"] == max(report["peak"]["convolutions"].values())
    figures = numbers(report)
    assert len(figures) > 150 and all(map(math.isfinite, figures))


@pytest.mark.parametrize("name", STAGES)
def test_stages_sum_to_the_total(report: dict[str, Any], name: str) -> None:
    part = report["parts"][name]
    assert list(part["stages"]) == STAGES[name]
    stages = {**part["stages"]}
    total = stages.pop("total")
    for figure, expected in (("share", 1.0), ("ms", part["median_ms"]), ("gflop", total["gflop"])):
        assert total[figure] == expected == pytest.approx(sum(stage[figure] for stage in stages.values()))
    assert all(stage["share"] > 0 for stage in stages.values())
    assert part["images_per_second"] == pytest.approx(2000 / part["median_ms"])
    assert part["median_ms"] <= part["p90_ms"] and part["profiled_iterations"] == part["iterations"] == 3
    assert part["queued_images_per_second"] > 0 and part["profiler_cost"] > 0


def test_every_stage_has_work(report: dict[str, Any]) -> None:
    parts = report["parts"]
    for name in ("inference", "optimized_inference"):
        assert parts[name]["instances_per_image"] > 5
    counted = [name for name, stage in parts["inference"]["stages"].items() if stage["gflop"]]
    assert counted == [*NETWORK[1:], "candidates", "Matrix NMS", "masks", "total"]
    assert parts["training"]["loss_mask"] > 0.1 and parts["training"]["loss_category"] > 0
    training = {name: stage["gflop"] for name, stage in parts["training"]["stages"].items()}
    forward = sum(training[name] for name in (*NETWORK, "loss"))
    assert 1.5 * forward < training["backward"] <= 2 * forward
    assert parts["loading"]["worker_images_per_second"] > 0 and parts["loading"]["stages"]["total"]["gflop"] == 0


def test_panoptic_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They run up to segments, and the semantic branch, the labels and the merge are stages of their own."""
    parts = {}
    for mode in ("infer", "train"):
        path = tmp_path / f"{mode}.json"
        assert main([*TINY, *PANOPTIC, "--mode", mode, "--batch-size", "2", "--json", str(path)]) == 0
        parts |= json.loads(path.read_text())["parts"]
    shown = capsys.readouterr().out
    network = [*NETWORK, "semantic"]
    for name in ("inference", "optimized_inference"):
        stages, before = parts[name]["stages"], [*INFERENCE[:3], *network, *INFERENCE[-5:-2]]
        assert [*stages] == [*before, "semantic labels", "merge", OUTSIDE, "total"]
        assert all(stages[stage]["share"] > 0 for stage in stages)
        assert parts[name]["segments_per_image"] > 3
    cells = 16**2 + 3 * 8**2 + 2 * 4**2 + 2**2  # of the 3x3 convolutions; the 1x1 convolution has 16 x 16
    macs = 2 * (cells * 9 * 32 * 32 + 16**2 * 32 * 4)
    assert parts["inference"]["stages"]["semantic"]["gflop"] == pytest.approx(2 * macs / 1e9)
    assert [*parts["training"]["stages"]] == [*network, *STAGES["training"][len(NETWORK) :]]
    assert 0 < parts["training"]["loss_semantic"] < 3 and parts["training"]["stages"]["semantic"]["gflop"] > 0
    assert shown.count(" segments") == 2 and shown.count("semantic loss ") == 1


def test_panoptic_data(tmp_path: Path) -> None:
    """Without --data-root, the generated data has stuff, too."""
    path = tmp_path / "data.json"
    assert main(["quickstart_panoptic", *TINY[1:], "--mode", "data", "--json", str(path)]) == 0
    part = json.loads(path.read_text())["parts"]["loading"]
    assert [*part["stages"]] == STAGES["loading"] and part["worker_images_per_second"] > 0


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_operations_match_torchs_counter(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the steps that are actually measured."""
    found = []

    def compare(step: Any, _workload: Any) -> dict[str, Any]:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            step()
        found.append(counter.get_total_flops())
        assert count_flops(step).total() == counter.get_total_flops() > 1e6
        return {"stages": {}}

    monkeypatch.setattr(workloads, "measure", compare)
    monkeypatch.setattr(workloads, "format_part", lambda *_: "")
    assert main([*TINY, "--mode", mode]) == 0 and len(found) == (2 if mode == "infer" else 1)


def test_fused_convolutions_count_as_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(tiny_model()).eval()
    monkeypatch.setattr(WinogradConv2d, "is_suitable", lambda conv: False)  # which has fewer operations
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        plain, fused = (count_flops(functools.partial(form, images)) for form in (model, model.optimize()))
    assert plain == fused and plain["backbone"] > 1e6


def test_tables_are_labeled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--mode", "infer", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert [*json.loads(captured.out)["parts"]] == ["inference", "optimized_inference"]
    for text in (
        "quickstart: 64 x 64", "convolution peak", "without a profiler", "of 1 iterations;", "images/s",
        "profiled pass of 1 iterations", "Matrix NMS", "of peak",
    ):  # fmt: skip
        assert text in captured.err


def test_files_and_bf16_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate_shapes(tmp_path, train_images=6, val_images=1, size=64, seed=0)
    assert main([*TINY, "--mode", "data", "--data-root", str(tmp_path)]) == 0
    assert f"images of {tmp_path}" in capsys.readouterr().out
    assert main([*TINY, "--mode", "train", "--precision", "bf16", "--set", "train.clip_norm=1"]) == 0
    assert ", bf16, " in capsys.readouterr().out


def test_non_finite_losses_are_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def diverged(*_arguments: Any, **_named: Any) -> Any:
        return {"loss_mask": torch.tensor(math.nan)}, torch.tensor(0)

    monkeypatch.setattr(workloads, "take_step", diverged)
    assert main([*TINY, "--mode", "train"]) == 2
    assert "not finite in float32" in capsys.readouterr().err


def test_out_of_memory_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(workloads, "_model", full)
    assert main([*TINY, "--mode", "train"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("error: quickstart ", "memory", "--batch-size", "--size"))


def test_two_processes_measure_together(repo_root: Path, report_file: Path, tmp_path: Path) -> None:
    """Throughput is the images of both over the time of the slower one, printed once and compared with one process."""
    path = tmp_path / "two.json"
    done = subprocess.run(
        [*LAUNCHER, "benchmark.py", *TINY, "--batch-size", "2", "--mode", "train", "--json", str(path), "--compare",
         str(report_file)],
        cwd=repo_root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\ntraining: ") == 1 and "processes differs: 1 (old), 2 (new)" in done.stdout
    part = json.loads(path.read_text())["parts"]["training"]
    assert list(part["stages"]) == STAGES["training"]
    assert part["images_per_second"] <= 1000 * 4 / part["median_ms"] * (1 + 1e-9)


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


def test_a_sweep_runs_the_command_in_fresh_processes(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.json"
    monkeypatch.setattr(sys, "argv", [str(repo_root / "benchmark.py")])
    words = [*TINY, "--mode", "train", "--threads", "1", "--sweep", "size", "64x96", "--json", str(path)]
    assert main(words) == 0
    content = json.loads(path.read_text())
    assert content["sweep"] == "size" and content["reports"]["64x96"]["settings"]["size"] == [64, 96]
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["size", "part", "ms", "images/s", "peak", "MiB"]
    assert row.split()[:2] == ["64x96", "training"] and len(row.split()) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size 100 64", "--size must be two multiples of 32, at least 64, got 100 64"),
        ("--size 32 32", "--size must be two multiples of 32, at least 64, got 32 32"),
        ("--batch-size 0", "--batch-size: "),
        ("--mode nms", "invalid choice: 'nms'"),
        ("--candidates 5000", "--candidates 5000 is more than the"),
        ("--config solov2_r50_fpn_1x", "not allowed with"),
        ("--set model.nonsense=1", "nonsense"),
        ("--device nonsense", "device 'nonsense' is not usable here"),
        (f"--json {__file__}", "already exists"),
        ("--data-root /nonexistent", "no data: /nonexistent/annotations"),
        ("--sweep width 1", "--sweep takes one of batch-size, size, candidates, instances, precision, threads "),
        ("--sweep batch-size", "--sweep takes one of"),
        ("--sweep batch-size 1 x", "--batch-size: "),
        ("--sweep size 64x96 64", "--size: expected 2 arguments"),
        ("--sweep size 64x96 64x100", "--size must be two multiples of 32"),
        ("--sweep candidates 10 5000", "--candidates 5000 is more than the"),
        ("--sweep batch-size 1 --compare x", "not allowed with"),
        ("--compare no/such.json", "--compare no/such.json: No such file"),
        (f"--compare {__file__}", f"--compare {__file__} is not "),
    ],
)
def test_error_messages_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", *words.split()]) == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert line.startswith("error: ") and message in line and not captured.out
