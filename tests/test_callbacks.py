"""Callbacks receive the rows of the log, in their order, and can do nothing to the run but stop it."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.tiny_runs import SETTINGS

import solov2
from solov2.config import load_config
from solov2.errors import InputError, RunFailed
from solov2.training import callbacks as callbacks_module
from solov2.training.callbacks import Callbacks, TensorBoard
from solov2.training.logger import RunLogger
from solov2.training.signals import ASKED, STOPPED, Stopped, StopSignal
from solov2.weights import read_checkpoint

TINY = load_config("quickstart", SETTINGS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("callbacks") / "shapes"


def train(data: Path, output: Path, callbacks: list[Any], **more: Any) -> solov2.TrainResult:
    settings = {"epochs": 2, "workers": 0, "evaluate_every": 1, "picture_images": 0}
    return solov2.train(TINY, data=data, output=output, device="cpu", callbacks=callbacks, **{**settings, **more})


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(data: Path) -> solov2.TrainResult:
    """A run without callbacks."""
    return train(data, data.parent / "plain", [])


def test_they_receive_the_rows_of_the_log_and_change_nothing(
    data: Path, plain: solov2.TrainResult, tmp_path: Path
) -> None:
    received: list[Mapping[str, Any]] = []
    result = train(data, tmp_path / "run", [received.append])
    assert [dict(row) for row in received] == log_of(tmp_path / "run")
    kinds = [row["kind"] for row in received]
    assert kinds == ["start", *[*["train"] * 4, "epoch", "evaluation"] * 2, "end"] and received[-1]["error"] is None
    with pytest.raises(TypeError):
        received[0]["seed"] = 1  # type: ignore[index]
    assert result.metrics == plain.metrics
    assert plain.last is not None and result.last is not None
    one, two = (read_checkpoint(path).weights for path in (plain.last, result.last))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_one_that_fails_is_named_once_and_dropped(data: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    def broken(row: Mapping[str, Any]) -> None:
        calls.append(row["kind"])
        raise ZeroDivisionError("no network")

    received: list[Mapping[str, Any]] = []
    train(data, tmp_path / "run", [broken, received.append], epochs=1)
    texts = [row["text"] for row in log_of(tmp_path / "run") if row["kind"] == "warning"]
    assert calls == ["start"] and len(texts) == 1 and "broken" in texts[0] and "no network" in texts[0]
    assert received[-1]["kind"] == "end"


def test_one_that_asks_stops_the_run_with_a_checkpoint(
    data: Path, plain: solov2.TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here each row waits until the callback has returned, so that the step is known; then the run is resumed."""
    poll, done = StopSignal.poll, threading.Event()

    def ask(row: Mapping[str, Any]) -> bool:
        return row.get("step") == 3

    def seen(row: Mapping[str, Any]) -> None:
        if row.get("step") == 3:
            done.set()

    def waiting(stop: StopSignal, **options: bool) -> int:
        if any(row.get("step") == 3 for row in log_of(tmp_path / "run")):
            assert done.wait(20)
        return poll(stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "poll", waiting)
        with pytest.raises(Stopped, match="stopped by a callback; continue with: --resume") as stopped:
            train(data, tmp_path / "run", [ask, seen])
    assert stopped.value.code == STOPPED and isinstance(stopped.value, RunFailed)
    assert read_checkpoint(tmp_path / "run" / "last.pth").training.position == (0, 3)  # type: ignore[union-attr]
    assert log_of(tmp_path / "run")[-1]["error"] == str(stopped.value)
    result = train(data, tmp_path / "run", [], resume=True)
    assert result.metrics == plain.metrics


def test_true_alone_stops() -> None:
    callbacks = Callbacks([lambda row: row["value"]])
    for value in (None, 0, 1, "stop", False):
        callbacks({"value": value})
    callbacks.close()
    assert not callbacks.stop_requested
    callbacks = Callbacks([lambda _row: True, lambda _row: False])
    callbacks({})
    callbacks.close()
    assert callbacks.stop_requested and StopSignal(60, Path(), callbacks=callbacks).poll() == ASKED


def test_a_slow_one_does_not_hold_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(callbacks_module, "CLOSING_SECONDS", 0.2)
    freed = threading.Event()
    started = time.monotonic()
    with RunLogger(tmp_path, main=True, callbacks=[lambda _row: freed.wait(30)]) as logger:
        logger.write("start")
    freed.set()
    assert time.monotonic() - started < 10 and "left behind" in caplog.text
    assert [row["kind"] for row in log_of(tmp_path)] == ["start", "end", "warning"]


def test_other_ranks_call_nothing(tmp_path: Path) -> None:
    received: list[Mapping[str, Any]] = []
    with RunLogger(tmp_path, main=False, callbacks=[received.append]) as logger:
        logger.write("start")
    assert received == []


def test_the_end_of_a_failed_run_says_why(tmp_path: Path) -> None:
    received: list[Mapping[str, Any]] = []
    with (
        pytest.raises(RunFailed),
        RunLogger(tmp_path, main=True, callbacks=[received.append]),
    ):
        raise RunFailed("rank 1 is gone")
    assert received[-1]["kind"] == "end" and received[-1]["error"] == "rank 1 is gone"


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(InputError, match="callbacks must be functions .* got str"):
        solov2.train("quickstart", callbacks=["wandb"])  # type: ignore[list-item]


def test_tensorboard_writes_the_numbers_that_have_a_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    for row in (
        {"kind": "start", "time": 1.0, "seed": 3},
        {"kind": "train", "time": 2.0, "step": 5, "loss": 0.5, "note": "text"},
        {"kind": "end", "time": 3.0, "error": None},
    ):
        board(row)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 0.5)]


def example(repo_root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, repo_root / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_for_weights_and_biases(
    data: Path, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    callback = example(repo_root, "callback_wandb").WandbCallback("solov2")
    summary: dict[str, Any] = {}

    def keep(row: Mapping[str, Any]) -> None:  # before the run is closed
        if row["kind"] == "end":
            summary.update(callback.run.summary)

    train(data, tmp_path / "run", [keep, callback], epochs=1)
    # The numbers of the last step are added when the run is closed.
    assert wandb.run is None and summary["train/loss"] == pytest.approx(log_of(tmp_path / "run")[3]["loss"])
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"evaluation/segm_AP" in file.read_bytes()


def test_the_example_for_mlflow(data: Path, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    module = example(repo_root, "callback_mlflow")
    callback = module.MlflowCallback(str(tmp_path / "store"), "solov2")
    train(data, tmp_path / "run", [callback], epochs=1)
    run = callback.client.get_run(callback.run)
    assert run.info.status == "FINISHED" and run.data.params["seed"] == "0"
    history = callback.client.get_metric_history(callback.run, "train/loss")
    rows = [row for row in log_of(tmp_path / "run") if row["kind"] == "train"]
    assert [(entry.step, entry.value) for entry in history] == [(row["step"], row["loss"]) for row in rows]
