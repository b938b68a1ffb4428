"""What the benchmark measures with: stopwatch, operations, memory, sweeps, and the comparison of two reports."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from solov2.benchmarking import machine, measure, sweep
from solov2.benchmarking.compare import compare
from solov2.benchmarking.machine import added_memory, convolution_peak
from solov2.benchmarking.measure import Stopwatch, milliseconds
from solov2.benchmarking.roofline import Lap, count_flops
from solov2.commands.benchmark import main, parse_arguments, settings_of
from solov2.errors import InputError
from solov2.models.layers import DeformConv2d
from solov2.training.environment import environment, git_commit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolutions of the peak are of the size that the real network has; this is not."""
    monkeypatch.setattr(machine, "CONVOLUTIONS", ((3, 8, 16),))
    monkeypatch.setattr(machine, "MIN_SECONDS", 0.0)


def test_stopwatch_splits_or_takes_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that advances by a second whenever it is read."""
    seconds = itertools.count(0.0)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    for split, wanted in ((True, [("a", [2] * 3), ("b", [1] * 3), ("total", [4] * 3)]), (False, [("total", [1] * 3)])):
        watch = Stopwatch(CPU, split=split)
        for _ in range(3):
            watch.start()
            for stage in ("a", "b", "a"):
                watch.lap(stage)
            watch.finish()
        assert list(watch.samples.items()) == wanted


def test_percentiles() -> None:
    assert milliseconds([0.003, 0.001, 0.002]) == pytest.approx({"median_ms": 2.0, "p90_ms": 3.0})
    assert milliseconds([value / 1000 for value in range(1, 101)])["p90_ms"] == pytest.approx(90, abs=1)


def test_commit_is_that_of_the_checkout(repo_root: Path) -> None:
    commit = git_commit()
    assert commit is None or len(commit.rstrip("+")) >= 12
    if not (repo_root / ".git").exists():
        assert commit is None


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3, padding=1, bias=False), DeformConv2d(8, 16, 3, padding=1)])
def test_operations_of_forward_and_backward(layer: nn.Module) -> None:
    """2 x outputs x weights per filter; the backward pass takes two of them where the input needs its gradient."""
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    own = 2 * (2 * 16 * 6 * 5) * (8 * 3 * 3)
    offsets = 2 * (2 * 27 * 6 * 5) * (8 * 3 * 3) if isinstance(layer, DeformConv2d) else 0

    def step(lap: Lap) -> None:
        y = layer(x)
        lap("forward")
        y.relu()
        lap("nothing")
        y.sum().backward()
        lap("backward")

    forward = own + offsets
    assert count_flops(step) == {"forward": forward, "nothing": 0, "backward": 2 * forward}


@pytest.mark.parametrize(("precision", "layouts"), [("float32", 2), ("bf16", 1)])
def test_peak_is_the_best_convolution(precision: str, layouts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_fastest", lambda function, device: (function(), 0.5)[1])
    peak = convolution_peak(CPU, precision)
    height, width = machine.CONVOLUTION_SIZE
    assert peak["gflop_per_second"] == pytest.approx(2 * height * width * 16 * 8 * 9 / 0.5 / 1e9)
    assert (
        peak["convolution"].startswith(f"3x3 8->16 on 1 x {height} x {width}") and len(peak["convolutions"]) == layouts
    )


def test_added_memory_is_what_a_step_holds() -> None:
    kept = torch.ones(2**20)
    added = added_memory(lambda: (torch.ones(16 * 2**20) + kept.sum()).sum(), CPU)  # 64 MiB twice
    if added is not None:
        assert 110 < added < 180
        assert added_memory(lambda: None, CPU) < 16


def test_memory_is_unknown_where_the_peak_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_more: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    done: list[int] = []
    assert added_memory(lambda: done.append(1), CPU) is None and done == [1]


def sweep_arguments(*more: str) -> list[str]:
    return ["--config", "quickstart", "--size", "64", "64", "--iterations", "1", "--device", "cpu", *more]


def test_sweep_runs_every_point_in_a_process_of_its_own(tmp_path: Path) -> None:
    """A real process for one value; the peak is the parent's, the figures are the child's."""
    path = tmp_path / "sweep.json"
    arguments = sweep_arguments("--mode", "nms", "--sweep", "candidates", "50", "--threads", "1", "--json", str(path))
    assert main(arguments) == 0
    content = json.loads(path.read_text())
    assert [row["part"] for row in content["sweep"]] == [
        "nms_coco_classes", "nms_one_class", "postprocess", "postprocess_rle"
    ]  # fmt: skip
    for row in content["sweep"]:
        assert row["value"] == 50 and row["ms_per_unit"] == pytest.approx(row["ms"] / 50)
    [report] = content["reports"]
    assert report["candidates"] == 50 and report["postprocess"]["stages"]["total"]["share_of_peak"] > 0


def part(milliseconds: float, **more: Any) -> dict[str, Any]:
    """A measured part with nothing but its total."""
    return {
        "stages": {"total": {"median_ms": milliseconds}},
        "images_per_second": 1000 / milliseconds,
        "peak_memory_mib": 100.0,
        "step_memory_mib": 10.0,
        **more,
    }


def report_of(args: Any, milliseconds: float, name: str = "inference") -> dict[str, Any]:
    return {
        "config": "quickstart",
        "size": list(args.size),
        "batch_size": args.batch_size,
        "precision": "float32",
        "candidates": args.candidates,
        "instances": args.instances,
        name: part(milliseconds),
    }


@pytest.mark.parametrize(
    ("over", "values", "per_unit"),
    [
        ("batch", ["1", "4"], [100.0, 25.0]),
        ("size", ["64", "64x128"], [100 / 0.004096, 100 / 0.008192]),
        ("candidates", ["0", "20"], [None, 5.0]),
        ("instances", ["1", "50"], [100.0, 2.0]),
    ],
)
def test_units_of_a_sweep(
    over: str, values: list[str], per_unit: list[float | None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sweep, "measure_apart", lambda name, args, peak: (report_of(args, 100.0), None))
    mode = "train" if over == "instances" else "infer"
    assert main(sweep_arguments("--mode", mode, "--sweep", over, *values)) == 0
    rows, reports = sweep.run_sweep(
        settings_of(parse_arguments(sweep_arguments("--mode", mode, "--sweep", over, *values))), None, lambda _: None
    )
    assert [row["ms_per_unit"] for row in rows] == [value and pytest.approx(value) for value in per_unit]
    assert len(reports) == 2 and [row["step_memory_mib"] for row in rows] == [10, 10]
    output = capsys.readouterr().out
    assert f"{over:>12}" in output and "peak MiB" in output and "in a process of its own" in output


def test_a_point_that_does_not_fit_is_said_and_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(name: str, args: Any, peak: Any) -> tuple[Any, Any]:
        return (None, "does not fit into memory") if args.batch_size == 2 else (report_of(args, 10.0), None)

    monkeypatch.setattr(sweep, "measure_apart", measured)
    assert main(sweep_arguments("--mode", "infer", "--sweep", "batch", "1", "2", "4")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(" ")] == ["batch", "1", "4", "2"]
    assert lines[-2].endswith("2  does not fit into memory")


def test_processes_that_end_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        class Executor:
            def __init__(self, *_args: Any, **_more: Any) -> None: ...
            def __enter__(self) -> Executor:
                return self

            def __exit__(self, *_args: Any) -> None: ...
            def submit(self, *_args: Any) -> Any:
                raise error

        return Executor

    args = settings_of(parse_arguments(sweep_arguments()))
    for error, text in ((InputError("does not fit"), "does not fit"), (sweep.BrokenProcessPool(), "want of memory")):
        monkeypatch.setattr(sweep, "ProcessPoolExecutor", fail(error))
        report, reason = sweep.measure_apart("quickstart", args, None)
        assert report is None and text in reason


@pytest.fixture
def old(tmp_path: Path) -> dict[str, Any]:
    """A report as `--json` writes it."""
    args = settings_of(parse_arguments(sweep_arguments()))
    return {"environment": environment(CPU), "settings": dataclasses.asdict(args), "reports": [report_of(args, 100.0)]}


def test_comparison(old: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = copy.deepcopy(old)
    new["reports"][0]["inference"] = part(50.0)
    assert "warning" not in compare(old, new)
    new["environment"] |= {"threads": 77, "torch": "9.9"}
    new["reports"][0]["training"] = part(30.0)  # not in the old one
    new["reports"].append({**copy.deepcopy(new["reports"][0]), "batch_size": 8})
    for name, content in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert main(["--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning: threads differs:") and lines[1].startswith("warning: torch differs:")
    assert lines[2].startswith("quickstart: 64 x 64, batch 1, float32")
    assert lines[4].split() == ["total", "100.00", "50.00", "2.00"]
    assert lines[5:] == [
        "the old report has nothing on quickstart: 64 x 64, batch 8, float32, 500 candidates, 8 instances"
    ]


def test_reports_of_before_can_be_compared(old: dict[str, Any]) -> None:
    """Earlier reports had candidates and instances in the settings only, and no number of processes."""
    new = copy.deepcopy(old)
    del old["environment"]["processes"], old["reports"][0]["candidates"], old["reports"][0]["instances"]
    assert compare(old, new).splitlines()[-1].split() == ["total", "100.00", "100.00", "1.00"]


@pytest.mark.parametrize("content", ["[]", "3", '{"reports": []}', '{"reports": [{}], "settings": {}}'])
def test_foreign_files_are_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main(["--compare", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"error: --compare {path} is not a report of benchmark.py --json"
