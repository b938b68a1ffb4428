"""A stopped run resumes bit-identically: position in the epoch, averages, exit codes, kept checkpoints, signals."""

from __future__ import annotations

import copy
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import number_of, numbered
from helpers.tiny_runs import arguments
from torch import nn

from solov2.build import build_model
from solov2.checkpoint import load_file, write_file
from solov2.commands.evaluate import main as evaluate_main
from solov2.commands.train import main
from solov2.config import load_config
from solov2.data.loader import TrainBatchSampler
from solov2.errors import InputError, RunFailed
from solov2.ops.images import read_image
from solov2.training.environment import images_sha256
from solov2.training.epochs import _ready_on_all_ranks
from solov2.training.folder import latest_checkpoint, newest_loadable, save_step, step_checkpoints, step_file
from solov2.training.optim import build_optimizer
from solov2.training.randomness import determinism
from solov2.training.resume import match_memory_format
from solov2.training.signals import RANK_FAILED, STOPPED, StopSignal, _Suspension
from solov2.weights import read_checkpoint

WORDS = [
    word
    for option in (
        "data.workers=2", "data.shapes_train=32", "data.train_scales=[64,56]", "train.accumulate=2",
        "train.ema_decay=0.9", "train.batch_size=2", "train.epochs=2", "train.evaluate_every=2",
        "train.checkpoint_steps=3",
    )
    for word in ("--set", option)
]  # fmt: skip
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "shapes"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(first, second):
    """Whether two checkpoints are bit-identical, including the states of the random number generators."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def log_of(folder):
    """The rows of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def started_training(launcher, words, repo_root, *, until="step 2"):
    """Start a training process and return it as soon as it has printed this step of its first epoch."""
    process = subprocess.Popen(
        [sys.executable, *launcher, "train.py", *words], cwd=repo_root, env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith(f"epoch 1  {until}"):
            return process
    raise AssertionError(process.stderr.read())


# The order of summation matters for three gradients, but not for two.
@pytest.mark.parametrize("processes", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_stopped_by_a_signal_inside_an_epoch(data, tmp_path, repo_root, processes):
    """SIGTERM saves that step and exits with code 75; the resumed run ends with the bits of an uninterrupted one."""
    launcher = [*LAUNCHER[:-1], str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "train.py", *arguments(data, tmp_path / "whole", *WORDS)]
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    words = arguments(data, tmp_path / "cut", *WORDS)
    process = started_training(launcher, words, repo_root)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "SIGTERM" in errors and f"--resume --output {tmp_path / 'cut'}" in errors
    assert process.returncode == (STOPPED if processes == 1 else 1)  # with several ranks, the exit code is torchrun's
    content = load_file(tmp_path / "cut" / "last.pth")
    assert content["epoch"] < 2 and content["step"] >= 1
    *_, last = (row for row in log_of(tmp_path / "cut") if row["kind"] == "train")
    newest, *_ = step_checkpoints(tmp_path / "cut")
    assert newest.name == step_file(last["step"])  # no step followed the saved one
    assert (tmp_path / "cut" / "last.pth").read_bytes() == newest.read_bytes()
    resumed = subprocess.run(
        [sys.executable, *launcher, "train.py", *words, "--resume"],
        cwd=repo_root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole, cut = (load_file(tmp_path / name / "last.pth") for name in ("whole", "cut"))
    assert [key for key in whole if not same(whole[key], cut[key])] == []
    assert not list((tmp_path / "cut").glob(".*.tmp"))
    kinds = [row["kind"] for row in log_of(tmp_path / "cut")]
    assert kinds.count("start") == 2 and kinds.count("resume") == 1 and kinds.count("evaluation") >= 1


def test_stopped_in_an_evaluation_its_epoch_is_saved(data, tmp_path, monkeypatch, capsys):
    """Even if checkpoints are rarer than evaluations; the resumed run evaluates first."""
    words = arguments(data, tmp_path / "run", *WORDS, "--evaluate-every", "1", "--set", "train.checkpoint_every=100")

    def stopped(_predictor, loader, *_evaluator, **_options):
        os.kill(os.getpid(), signal.SIGTERM)
        list(loader)

    with monkeypatch.context() as patch:
        patch.setattr("solov2.training.validation.evaluate", stopped)
        assert main(words) == STOPPED
    content = load_file(tmp_path / "run" / "last.pth")
    assert (content["epoch"], content["step"], content["evaluated"]) == (1, 0, 0)
    assert main([*words, "--resume"]) == 0
    assert capsys.readouterr().out.count("mask AP") >= 2


def test_a_truncated_checkpoint_is_skipped(data, tmp_path, capsys):
    words = [*WORDS, "--epochs", "1", "--evaluate-every", "0"]
    assert main(arguments(data, tmp_path / "run", *words)) == 0
    newest, older = step_checkpoints(tmp_path / "run")
    content = newest.read_bytes()
    assert (tmp_path / "run" / "last.pth").read_bytes() == content
    newest.write_bytes(content[: len(content) // 2])  # last.pth is the same file
    capsys.readouterr()
    assert main(arguments(data, tmp_path / "run", *words, "--resume")) == 0
    output = capsys.readouterr()
    assert f"checkpoint skipped: {tmp_path / 'run' / 'last.pth'}" in output.err and f"resumed {older}" in output.out
    for path in (tmp_path / "run").glob("*.pth"):
        path.write_bytes(b"nothing")
    assert main(arguments(data, tmp_path / "run", *words, "--resume", "auto")) == 2
    assert f"nothing to resume: {tmp_path / 'run'} " in capsys.readouterr().err


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 15):
        save_step(tmp_path, step, numbered(step), keep=2)
    assert [path.name for path in step_checkpoints(tmp_path)] == ["step_00000015.pth", "step_00000010.pth"]
    assert number_of(latest_checkpoint(tmp_path)) == 15
    (tmp_path / "last.pth").unlink()
    assert latest_checkpoint(tmp_path) == step_checkpoints(tmp_path)[0]
    newest, unreadable = newest_loadable(tmp_path)
    assert newest.source == str(step_checkpoints(tmp_path)[0]) and unreadable == []
    assert not list(tmp_path.glob(".*"))


def test_without_hard_links_the_last_checkpoint_is_a_copy(tmp_path, monkeypatch):
    def fail(*_paths):
        raise OSError("no hard links")

    monkeypatch.setattr(os, "link", fail)
    save_step(tmp_path, 1, numbered(1), keep=1)
    assert number_of(tmp_path / "last.pth") == 1 and not list(tmp_path.glob(".*"))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    save_step(tmp_path, 1, numbered(1), keep=2)

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            save_step(tmp_path, 2, numbered(2), keep=2)
    assert number_of(tmp_path / "last.pth") == 1 and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_a_user_error(data, tmp_path, capsys, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("solov2.training.run.save_step", full)
    assert main(arguments(data, tmp_path / "run", *WORDS, "--evaluate-every", "0")) == 2
    errors = capsys.readouterr().err
    assert all(part in errors for part in (f"{tmp_path / 'run'} (No space left on device)", "--resume"))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_sampler_resumes_inside_an_epoch(first):
    ratios = [1.5, 0.7, 1.2, 1.0, 0.5, 1.1, 2.0]
    one, two = (TrainBatchSampler(ratios, batch_size=2, rank=1, world_size=2, seed=3) for _ in range(2))
    one.set_epoch(4)
    two.set_epoch(4, first_batch=first)
    assert list(two) == list(one)[first:] and len(one) == len(two)


def test_build_model_loads_the_averaged_weights(data, tmp_path):
    assert main(arguments(data, tmp_path / "run", *WORDS, "--epochs", "1")) == 0
    content = load_file(tmp_path / "run" / "last.pth")
    assert content["updates"] == 8
    model = build_model(weights=tmp_path / "run" / "last.pth")
    name = "head.category_predictor.weight"
    assert torch.equal(model.state_dict()[name], content["averaged"][name])
    assert not torch.equal(content["model"][name], content["averaged"][name])


def test_a_rank_saves_and_ends_with_one_that_has_no_batch(monkeypatch):
    """The other rank's worker has died; this one, which has its batch, saves the step that both have completed."""
    saved = []
    run = SimpleNamespace(
        dataset=None, config=SimpleNamespace(train=SimpleNamespace(stall_seconds=1)), global_step=3,
        save=lambda: saved.append(3), logger=SimpleNamespace(print=print),
    )  # fmt: skip
    stop = SimpleNamespace(poll=lambda *, failed: RANK_FAILED, check=int)
    monkeypatch.setattr("solov2.training.epochs.watched", lambda *_loader, **_options: iter([{}]))
    monkeypatch.setattr("solov2.distributed.all_gather_objects", lambda own: [own, "a worker was killed"])
    with pytest.raises(RunFailed, match="rank 1 failed: a worker was killed"):
        next(_ready_on_all_ranks(run, None, stop))
    assert saved == [3]


@pytest.mark.parametrize(
    ("error", "missing", "suspended", "words"),
    [
        ("[pair.cc:534] Connection closed by peer [127.0.0.1]:37033", [1, 3], 0, ("ranks 1, 3", "--resume")),
        ("Timed out waiting 60000ms for recv operation", [1], 20, ("rank 1 ", "60 seconds", "stall_seconds")),
        ("Timed out waiting 60000ms for recv operation", [1], 70, ("suspended for 70 seconds", "--resume")),
        ("Timed out waiting 60000ms for recv operation", [], 0, ("all respond now", "--resume")),
        ("out of memory", [], 0, None),
    ],
)
def test_a_lost_rank_is_named(monkeypatch, error, missing, suspended, words):
    stop = StopSignal(60, Path())
    stop._group = object()
    monkeypatch.setattr("solov2.distributed.missing_ranks", lambda _seconds: missing)
    monkeypatch.setattr("solov2.training.signals._Suspension.seconds", lambda _self, *, within: suspended)
    with pytest.raises(RuntimeError) as failed, stop.report_unresponsive_ranks():
        raise RuntimeError(error)
    assert isinstance(failed.value, RunFailed) == (words is not None)
    assert all(word in str(failed.value) for word in words or [error])


def test_a_suspension_is_measured(monkeypatch):
    monkeypatch.setattr("solov2.training.signals.BEAT_SECONDS", 0.01)
    clock = itertools.chain([0, 1, 21, 22, 23], itertools.repeat(24))
    monkeypatch.setattr("solov2.training.signals.time", SimpleNamespace(monotonic=lambda: next(clock)))
    suspension = _Suspension()
    time.sleep(0.3)
    assert (suspension.seconds(within=60), suspension.seconds(within=2)) == (20, 0)
    suspension.ended.set()


def test_a_signal_is_reported_and_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with StopSignal(60, Path()) as stop:
        assert stop.poll() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.poll() == signal.SIGUSR1
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(("enabled", "warn_only", "workspace"), [(False, False, None), (True, True, ":16:8")])
def test_determinism_restores_the_settings_of_its_caller(monkeypatch, enabled, warn_only, workspace):
    def settings():
        flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        return *flags, os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    try:
        with determinism(True):
            assert settings() == (True, False, workspace or ":4096:8")
        assert settings() == (enabled, warn_only, workspace)
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_runs_are_identical(data, tmp_path):
    words = [*WORDS, "--epochs", "1", "--evaluate-every", "0", "--deterministic"]
    for name in "ab":
        assert main(arguments(data, tmp_path / name, *words)) == 0
    one, two = (load_file(tmp_path / name / "last.pth") for name in "ab")
    assert same(one, two) and one["config"]["train"]["deterministic"]
    start = log_of(tmp_path / "a")[0]
    assert {"commit", "torch", "device", "configuration_sha256", "annotations_sha256", "seed"} <= set(start)


def children_of(pid):
    """Process ids whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
def test_a_killed_worker_is_reported(data, tmp_path, repo_root):
    words = [*WORDS, "--set", "data.workers=1", "--epochs", "50"]
    process = started_training([], arguments(data, tmp_path / "run", *words), repo_root)
    for pid in children_of(process.pid):
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and all(part in errors for part in ("memory", "--workers", ".jpg"))
    assert "Traceback" not in errors


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
def test_a_frozen_worker_is_reported(data, tmp_path, repo_root):
    words = [*WORDS, "--set", "data.workers=1", "--epochs", "50", "--set", "train.stall_seconds=2"]
    process = started_training([], arguments(data, tmp_path / "run", *words), repo_root)
    for pid in children_of(process.pid):
        os.kill(pid, signal.SIGSTOP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "train.stall_seconds" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_a_hanging_worker_is_reported(data, tmp_path, capsys, monkeypatch, split):
    """Storage that does not respond, in training or in the evaluation after it; workers inherit the patch."""

    def read(path, **options):
        if split in str(path):
            time.sleep(600)
        return read_image(path, **options)

    monkeypatch.setattr("solov2.data.image_dataset.read_image", read)
    words = [*WORDS, "--set", "train.stall_seconds=2", "--epochs", "1"]
    assert main(arguments(data, tmp_path / "run", *words)) == 1
    errors = capsys.readouterr().err
    assert "train.stall_seconds" in errors and ".jpg" in errors
    assert (latest_checkpoint(tmp_path / "run") is not None) == (split == "val2017")


def test_a_killed_worker_of_an_evaluation_is_reported(data, tmp_path, capsys, monkeypatch):
    assert main(arguments(data, tmp_path / "run", *WORDS, "--epochs", "1", "--evaluate-every", "0")) == 0
    monkeypatch.setattr(
        "solov2.data.image_dataset.read_image", lambda *_path, **_options: os.kill(os.getpid(), signal.SIGKILL)
    )
    assert evaluate_main(["--weights", str(tmp_path / "run" / "last.pth"), "--device", "cpu"]) == 1
    errors = capsys.readouterr().err
    assert "memory" in errors and "000000000001.jpg" in errors


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "evaluating"])
def test_an_unresponsive_rank_is_named(data, tmp_path, repo_root, moment):
    """One of two ranks is suspended; the other names it after train.stall_seconds."""
    words = [*WORDS, "--epochs", "500", "--set", "train.stall_seconds=10"]
    until = "step 2"
    if moment == "evaluating":
        data, until = data.with_name("more"), "step 4"  # the last step
        words += ["--epochs", "1", "--set", "data.shapes_val=1000"]
    process = started_training(LAUNCHER, arguments(data, tmp_path / "run", *words), repo_root, until=until)
    time.sleep(1)
    (second,) = (p for p in children_of(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
    os.kill(second, signal.SIGSTOP)
    watching = threading.Timer(60, os.kill, (second, signal.SIGKILL))
    watching.start()
    _, errors = process.communicate(timeout=120)
    watching.cancel()
    assert process.returncode == 1 and "rank 0 waited" in errors and "10 seconds (train.stall_seconds)" in errors
    assert "rank 1 does not respond" in errors


@pytest.mark.slow
def test_a_dead_rank_is_named(data, tmp_path, repo_root):
    words = [*WORDS, "--epochs", "500", "--evaluate-every", "0"]
    process = started_training(LAUNCHER, arguments(data, tmp_path / "run", *words), repo_root)
    (second,) = (p for p in children_of(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "rank 0 waited" in errors and "rank 1 does not respond" in errors


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], LAUNCHER])
def test_a_killed_worker_loses_no_step(data, tmp_path, repo_root, launcher):
    """With several ranks, all of them save the step that they have in common; the resumed run equals a whole one."""
    words = [*WORDS, "--evaluate-every", "0", "--set", "train.checkpoint_steps=0", "--set", "data.workers=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = started_training(launcher, arguments(data, tmp_path / "cut", *words), repo_root, until="step 1")
    trainers = children_of(process.pid) if launcher else [process.pid]
    workers = [worker for trainer in trainers for worker in children_of(trainer)]
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "killed" in errors
    *_, last = (row for row in log_of(tmp_path / "cut") if row["kind"] == "train")
    assert step_checkpoints(tmp_path / "cut")[0].name == step_file(last["step"])
    for name, more in (("cut", ["--resume"]), ("whole", [])):
        command = [sys.executable, *launcher, "train.py", *arguments(data, tmp_path / name, *words, *more)]
        subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, timeout=200, check=True)
    assert same(*(load_file(tmp_path / name / "last.pth") for name in ("whole", "cut")))


def test_moments_take_the_memory_format_of_their_parameters():
    torch.manual_seed(0)
    models = [nn.Conv2d(3, 4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = []
    for model, memory_format in zip(models, (torch.contiguous_format, torch.channels_last)):
        optimizer = build_optimizer(
            model, name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.0, decay_norms=True
        )
        if optimizers:
            model.to(memory_format=memory_format)
            model.load_state_dict(models[0].state_dict())
            optimizer.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            match_memory_format(optimizer)
        optimizers.append(optimizer)
        if len(optimizers) == 1:
            descend(model, optimizer)
    for model, optimizer in zip(models, optimizers):
        descend(model, optimizer)
        momentum = optimizer.state[model.weight]["momentum_buffer"]
        assert momentum.stride() == model.weight.stride()
    torch.testing.assert_close(models[1].weight, models[0].weight)


def descend(model, optimizer):
    """One step on a fixed image."""
    model(torch.linspace(-1, 1, 192).view(1, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_precision_may_change_at_resume(data, tmp_path):
    words = [*WORDS, "--set", "train.evaluate_every=0"]
    run = tmp_path / "run"
    assert main(arguments(data, run, *words, "--epochs", "1")) == 0
    assert main(arguments(data, run, *words, "--epochs", "2", "--precision", "fp16", "--resume")) == 0
    content = load_file(run / "last.pth")
    assert content["epoch"] == 2 and content["scaler"]["scale"] > 0


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of two epochs of four steps, each saved, with an evaluation at its end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = ["train.keep_checkpoints=8", "train.checkpoint_steps=1", "train.ema_decay=0", "data.workers=0"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(arguments(data, folder, *WORDS, "--batch-size", "4", *words)) == 0
    return folder


def copy_of(finished, folder):
    shutil.copytree(finished, folder)
    return folder


def test_the_configuration_comes_with_the_checkpoint(finished, tmp_path, capsys):
    """The flags printed at the end of a stopped run are enough to resume it."""
    run = copy_of(finished, tmp_path / "run")
    before = (run / "config.yaml").read_text()
    assert main(["--resume", "--output", str(run), "--device", "cpu"]) == 0
    assert (run / "config.yaml").read_text() == before and "changed" not in capsys.readouterr().err
    assert main(["--resume", "--output", str(run), "--device", "cpu", "--epochs", "3", "--evaluate-every", "0"]) == 0
    assert load_file(run / "last.pth")["epoch"] == 3
    assert "train.epochs 2 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--epochs", "1"], ("step_00000008.pth", "after 2 epochs,", "1 epoch;", "--epochs")),
        (["--optimizer", "sgd"], ("step_00000008.pth", "adamw", "sgd", "--optimizer adamw", "--weights")),
    ],
)
def test_a_failed_resume_changes_nothing(finished, tmp_path, capsys, words, parts):
    run = copy_of(finished, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "log.jsonl"}
    assert main(["--resume", "--output", str(run), "--device", "cpu", *words]) == 2
    errors = capsys.readouterr().err
    assert all(part in errors for part in parts), errors
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.name != "log.jsonl"}


def test_settings_changed_at_resume_apply(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path / "run")
    words = ["--set", "train.weight_decay=0.25", "--set", "train.ema_decay=0.5", "--evaluate-every", "0"]
    assert main(["--resume", "--output", str(run), "--device", "cpu", "--epochs", "3", *words]) == 0
    warnings = capsys.readouterr().err
    assert "train.weight_decay" in warnings and "-> 0.25" in warnings and "train.epochs 2 -> 3" in warnings
    content = load_file(run / "last.pth")
    assert content["optimizer"]["param_groups"][0]["weight_decay"] == 0.25
    name = "head.category_predictor.weight"  # the average started from the resumed weights, not from random ones
    assert (content["averaged"][name] - content["model"][name]).abs().max() < 0.1 * content["model"][name].abs().max()


def test_resuming_an_earlier_step_renames_later_checkpoints(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path / "run")
    (run / "chosen.pth").write_bytes((run / "step_00000003.pth").read_bytes())
    for path in step_checkpoints(run)[-3:]:
        path.unlink()  # as if train.keep_checkpoints had been smaller
    words = ["--evaluate-every", "0", "--set", "train.checkpoint_steps=0", "--set", "train.keep_checkpoints=1"]
    assert main(["--resume", str(run / "chosen.pth"), "--output", str(run), "--device", "cpu", *words]) == 0
    assert "step_00000008.pth.aside" in capsys.readouterr().err
    assert load_file(run / "step_00000008.pth.aside")["epoch"] == 2
    assert [path.name for path in step_checkpoints(run)] == ["step_00000008.pth"]
    whole, again = (load_file(folder / "last.pth") for folder in (finished, run))
    assert same(whole["model"], again["model"])


def test_a_larger_batch_resumes_without_setting_its_checkpoint_aside(finished, tmp_path, capsys):
    """Epochs have fewer steps then, so the resumed step has a smaller number than the file it comes from."""
    run = copy_of(finished, tmp_path / "run")
    source = run / "step_00000007.pth"
    words = ["--device", "cpu", "--batch-size", "8", "--epochs", "3", "--evaluate-every", "0"]
    content = source.read_bytes()
    (run / "last.pth").unlink()
    assert main(["--resume", str(source), "--output", str(run), *words, "--set", "train.keep_checkpoints=2"]) == 0
    assert "8 images per step, now 16" in capsys.readouterr().err
    assert source.read_bytes() == content
    assert sorted(path.name for path in run.glob("*.aside")) == [f"{step_file(step)}.aside" for step in (4, 5, 6, 8)]
    newest, _ = newest_loadable(run)
    assert newest.training.position == (3, 0)
    assert [path.name for path in step_checkpoints(run)] == [step_file(step) for step in (7, 6, 5)]


def test_what_changed_since_the_checkpoint_is_logged(finished, tmp_path, capsys):
    """A bit-identical resume needs the same data and the same machine."""
    run = copy_of(finished, tmp_path / "run")
    words = ["--resume", "--output", str(run), "--device", "cpu"]
    assert main(words) == 0
    assert "since" not in capsys.readouterr().err
    checkpoint = read_checkpoint(run / "last.pth")
    known = checkpoint.training.conditions
    assert {
        "device",
        "precision",
        "CPU threads",
        "processes",
        "torch",
        "training images",
        "validation annotations",
    } == set(known)
    other = {name: "other" for name in known} | {"unknown": "name"}
    for conditions, changed in ((other, list(known)), ({}, [])):  # {}: a checkpoint without this entry
        replace(checkpoint, training=replace(checkpoint.training, conditions=conditions)).save(run / "last.pth")
        shutil.copy(run / "last.pth", run / step_file(8))
        assert main(words) == 0
        errors, logged = capsys.readouterr().err, [row for row in log_of(run) if row["kind"] == "resume"][-1]
        assert logged["changed"] == changed
        for part in ("CPU threads other -> 1", "processes other -> 1", "torch", "images in", "validation", "best.pth"):
            assert (part in errors) == bool(changed), (part, errors)


def test_changed_images_are_noticed(tmp_path):
    names = [f"{index}.jpg" for index in range(2500)]
    dataset = SimpleNamespace(files=lambda: [("image", tmp_path, names, "--train-images")])
    for index in range(2500):
        (tmp_path / f"{index}.jpg").write_bytes(b"x" * index)
    first = images_sha256(dataset)
    assert images_sha256(dataset) == first
    (tmp_path / "3.jpg").write_bytes(b"xyx")  # one of the thousand that are read
    changed = images_sha256(dataset)
    (tmp_path / "3.jpg").unlink()
    assert len({first, changed, images_sha256(dataset)}) == 3


def test_the_best_checkpoint_of_a_cut_run_equals_that_of_a_whole_one(finished, tmp_path, monkeypatch):
    """Killed in its evaluation, the run resumes, evaluates again and saves the same entries."""
    run = copy_of(finished, tmp_path / "run")
    (run / "best.pth").unlink()
    assert main(["--resume", "--output", str(run), "--device", "cpu"]) == 0
    whole, cut = (load_file(folder / "best.pth") for folder in (finished, run))
    assert [key for key in whole if not same(whole[key], cut.get(key))] == []


def test_an_older_checkpoint_keeps_the_arithmetic_it_ran_with(finished, tmp_path, capsys):
    """Its float32 was what is now called tf32; files since then have the condition "precision"."""
    content = load_file(finished / "last.pth")
    assert content["conditions"].pop("precision") == "float32"  # what tf32 is on a CPU
    content["config"]["train"]["precision"] = "float32"
    write_file(tmp_path / "older.pth", content)
    for name, words, changed in (("run", [], False), ("other", ["--precision", "float32"], True)):
        source = ["--resume", str(tmp_path / "older.pth"), "--output", str(tmp_path / name)]
        assert main([*source, *words, "--device", "cpu"]) == 0
        assert ("tf32" in capsys.readouterr().out) != changed
        assert load_config(tmp_path / name / "config.yaml").train.precision == ("float32" if changed else "tf32")
        (row,) = (row for row in log_of(tmp_path / name) if row["kind"] == "resume")
        assert any("train.precision" in text for text in row["changed"]) == changed


def test_a_checkpoint_resumes_in_another_folder(finished, tmp_path, capsys):
    """The source folder does not change; the new one has its own checkpoints and best.pth."""
    other = copy_of(finished, tmp_path / "other")
    source = str(finished / "step_00000004.pth")
    assert main(["--resume", source, "--output", str(other), "--device", "cpu"]) == 2
    assert f"{other} " in (errors := capsys.readouterr().err) and "--overwrite" in errors
    assert main(["--resume", source, "--output", str(tmp_path / "new"), "--device", "cpu"]) == 0
    assert (tmp_path / "new" / "best.pth").is_file()
    assert main(["--resume", source, "--output", str(other), "--device", "cpu", "--overwrite"]) == 0
    whole, new, replaced = (load_file(folder / "last.pth") for folder in (finished, tmp_path / "new", other))
    assert same(whole["model"], new["model"]) and same(new, replaced)


def test_an_unreadable_image_loses_no_step(data, tmp_path, capsys, monkeypatch):
    """An image of the third step cannot be read; once it can, the resumed run equals an undisturbed one."""
    words = [*WORDS, "--evaluate-every", "0", "--set", "train.checkpoint_steps=0", "--set", "data.workers=0"]
    assert main(arguments(data, tmp_path / "whole", *words)) == 0
    calls = 0

    def read(path, **options):
        nonlocal calls
        calls += 1
        if calls > 10:  # two steps read eight images
            raise InputError(f"{path} cannot be read")
        return read_image(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr("solov2.data.image_dataset.read_image", read)
        assert main(arguments(data, tmp_path / "cut", *words)) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert load_file(tmp_path / "cut" / "last.pth")["step"] == 2
    assert main(["--resume", "--output", str(tmp_path / "cut"), "--device", "cpu"]) == 0
    assert same(*(load_file(tmp_path / name / "last.pth") for name in ("whole", "cut")))


def test_a_run_that_fails_between_two_batches_exits(data, finished, tmp_path, repo_root):
    """Its workers would not exit by themselves. A limit of 1 MB per file stands for a full disk."""
    command = [sys.executable, "train.py", *arguments(data, tmp_path / "run", *WORDS)]
    failed = subprocess.run(
        command,
        cwd=repo_root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )
    assert failed.returncode == 2 and f"checkpoint to {tmp_path / 'run'}" in failed.stderr
    assert "Traceback" not in failed.stderr and not list((tmp_path / "run").glob("*.pth"))


def test_the_newest_checkpoint_is_the_newest_step(finished, tmp_path):
    """Even if a run was killed after writing a step file but before replacing `last.pth`, or the file is damaged."""
    run = copy_of(finished, tmp_path / "run")
    os.link(run / "step_00000007.pth", run / "link")
    os.replace(run / "link", run / "last.pth")
    newest, unreadable = newest_loadable(run)
    assert newest.source == str(run / "step_00000008.pth") and unreadable == []
    (run / "step_00000008.pth").write_bytes(b"damaged")
    newest, unreadable = newest_loadable(run)
    assert newest.source == str(run / "step_00000007.pth")
    assert len(unreadable) == 1 and "step_00000008.pth" in unreadable[0]


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignal(60, Path()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.poll() == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopSignal(60, Path()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.poll() == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
