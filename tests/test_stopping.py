"""Runs that end before their last epoch: without a better evaluation, and at a time limit. They resume to the bit."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_panoptic import panoptic_arguments
from helpers.tiny_runs import arguments

import solov2
from solov2.checkpoint import load_file, write_file
from solov2.commands.train import main
from solov2.errors import InputError
from solov2.training.signals import STOPPED, TIME_UP, StopSignal, stop_message

SETTINGS = ("data.workers=0", "train.picture_images=0", "train.evaluate_every=1", "train.keep_checkpoints=99")
STILL = ("train.learning_rate=1e-12", "train.early_stopping=2", "train.epochs=9", "train.checkpoint_steps=3")


def words(*settings: str) -> list[str]:
    return [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def is_same_run(first: Path, second: Path) -> bool:
    """Whether the checkpoints of two runs are bit-identical in every entry."""
    return all(same(load_file(first / name), load_file(second / name)) for name in ("last.pth", "best.pth"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopping") / "shapes"


@pytest.fixture(scope="module")
def still(data: Path) -> Path:
    """A run that learns nothing, with early stopping after two evaluations."""
    folder = data.parent / "still"
    assert main(arguments(data, folder, *words(*STILL))) == 0
    return folder


def test_a_run_without_progress_ends_early(still: Path) -> None:
    """The first evaluation is the best, two more are not better."""
    evaluations = rows(still, "evaluation")
    assert [row["epoch"] for row in evaluations] == [1, 2, 3]
    assert len({row["segm_AP"] for row in evaluations}) == 1
    best, last = (load_file(still / f"{name}.pth") for name in ("best", "last"))
    assert (best["epoch"], best["stale"]) == (1, 0) and (last["epoch"], last["stale"]) == (
        3,
        1,
    )  # saved before the last


@pytest.mark.parametrize("cut", ["step_00000009.pth", "step_00000012.pth"])
def test_early_stopping_resumes_to_the_bit(data: Path, still: Path, tmp_path: Path, cut: str) -> None:
    """In the middle of the third epoch, and before its evaluation."""
    folder = shutil.copytree(still, tmp_path / "run")
    for path in folder.glob("*.pth"):
        if path.name == "last.pth" or cut < path.name:
            path.unlink()
    assert main(arguments(data, folder, *words(*STILL), "--resume")) == 0
    assert is_same_run(still, folder) and rows(folder, "evaluation")[-1]["epoch"] == 3


def test_a_run_that_ended_early_continues_with_more_patience(data: Path, still: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(still, tmp_path / "run")
    assert main(arguments(data, folder, *words(*STILL, "train.early_stopping=3"), "--resume")) == 0
    assert [row["epoch"] for row in rows(folder, "evaluation")] == [1, 2, 3, 3, 4]


def test_files_of_older_versions_have_no_count(data: Path, still: Path, tmp_path: Path) -> None:
    content = load_file(still / "last.pth")
    del content["stale"], content["config"]["train"]["early_stopping"]
    (tmp_path / "run").mkdir()
    write_file(tmp_path / "run" / "last.pth", content)
    assert main(arguments(data, tmp_path / "run", *words(*STILL), "--resume")) == 0
    assert [row["epoch"] for row in rows(tmp_path / "run", "evaluation")] == [3, 4]  # the count begins with the third


def test_panoptic_models_stop_by_their_quality(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(panoptic_arguments(tmp_path / "data", folder, *words(*STILL, "train.early_stopping=1"))) == 0
    assert [row["epoch"] for row in rows(folder, "evaluation")] == [1, 2]


def test_early_stopping_needs_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--evaluate-every", "0", "--set", "train.early_stopping=2", "--dry-run"]) == 2
    assert "train.early_stopping must be 0 without evaluations" in capsys.readouterr().err


def clock(steps: int) -> Iterator[float]:
    """The time limit is reached after so many polls."""
    return itertools.chain([0.0] * steps, itertools.repeat(math.inf))


@pytest.mark.parametrize("polls", [3, 6])
def test_the_time_limit_stops_after_a_step_and_resumes_to_the_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], polls: int
) -> None:
    """Four polls before steps, one that finds the epoch's end, one after its evaluation: there, it is not cut short."""
    line = words("train.epochs=2")
    assert main(arguments(data, tmp_path / "whole", *line)) == 0
    with monkeypatch.context() as patch:
        times = clock(polls)
        patch.setattr("solov2.training.signals.time", SimpleNamespace(monotonic=lambda: next(times)))
        code = main(arguments(data, tmp_path / "cut", *line, "--max-hours", "1000"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == STOPPED == 75 and "--max-hours" in error and f"--resume --output {tmp_path / 'cut'}" in error
    content = load_file(tmp_path / "cut" / "last.pth")
    assert (content["epoch"], content["step"]) == ((0, 3) if polls == 3 else (1, 0))
    assert len(rows(tmp_path / "cut", "evaluation")) == (polls == 6)
    assert main(arguments(data, tmp_path / "cut", *line, "--resume", "--max-hours", "1000")) == 0
    assert is_same_run(tmp_path / "whole", tmp_path / "cut")


def test_the_time_limit_is_that_of_the_call(data: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    assert main(arguments(data, tmp_path / "run", *words("train.epochs=100000"), "--max-hours", "0.0005")) == STOPPED
    assert 1.8 <= time.monotonic() - started < 60
    last, logged = load_file(tmp_path / "run" / "last.pth"), rows(tmp_path / "run", "train")
    assert last["epoch"] * 4 + last["step"] == (logged[-1]["step"] if logged else 0)


@pytest.mark.parametrize("hours", [0, -1.0, math.nan, math.inf])
def test_invalid_time_limits(hours: float, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="max_hours"):
        solov2.train("quickstart", max_hours=hours)
    assert main(["quickstart", "--max-hours", str(hours)]) == 2
    assert "max-hours" in capsys.readouterr().err


def test_signals_come_before_the_time_limit() -> None:
    stop = StopSignal(60, Path(), deadline=0.0)
    assert stop.poll() == TIME_UP and list(stop.until_signaled([1, 2])) == [1, 2]
    stop.received = 15
    assert stop.poll() == 15
    assert "no checkpoint yet" in stop_message(TIME_UP, Path("nowhere"))
