"""`solov2.train()`: its result, its arguments, and its exceptions."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from helpers.tiny_runs import SETTINGS

import solov2
from solov2.commands.evaluate import main as eval_main
from solov2.commands.predict import main as predict_main
from solov2.commands.train import main as train_main
from solov2.config import SECTIONS, load_config, override_config
from solov2.data.build import locate_data
from solov2.errors import InputError, RunFailed
from solov2.training import step as training_step
from solov2.training.signals import SIGNALS, STOPPED, Stopped
from solov2.weights import read_checkpoint

TINY = load_config("quickstart", SETTINGS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(data, result) of a run of two epochs."""
    root = tmp_path_factory.mktemp("python")
    result = solov2.train(TINY, data=root / "shapes", output=root / "run", device="cpu", epochs=2, learning_rate=0.001)
    return root / "shapes", result


def test_the_result(run):
    _, result = run
    assert isinstance(result, solov2.TrainResult)
    assert result.last == result.folder / "last.pth" and result.last.is_file()
    assert result.best == result.folder / "best.pth" and result.best.is_file()
    assert len(result.metrics) == 24 and 0 <= result.metrics["segm_AP"] <= result.metrics["segm_AP50"] <= 1
    checkpoint = read_checkpoint(result.last)
    assert checkpoint.config["train"]["epochs"] == 2 and checkpoint.config["train"]["learning_rate"] == 0.001
    assert read_checkpoint(result.best).training.best == result.metrics["segm_AP"]
    assert solov2.build_model(weights=checkpoint).class_names == checkpoint.class_names


def test_setting_names_are_unique():
    names = Counter(entry.name for section in SECTIONS.values() for entry in fields(section))
    assert [name for name, count in names.items() if count > 1] == []
    # Nor may a setting have the name of an argument of train or build_model.
    assert not names.keys() & {"name_or_config", "data", "weights", "output", "resume", "device", "overwrite"}


def test_named_files_resume_and_weights(run, tmp_path):
    """Four paths instead of a folder; fine-tuning from a checkpoint in memory; resuming without the configuration."""
    data, result = run
    paths = {
        f"{split}_{kind}": data
        / (f"annotations/instances_{split}2017.json" if kind == "annotations" else f"{split}2017")
        for split in ("train", "val")
        for kind in ("annotations", "images")
    }
    quick = {"device": "cpu", "evaluate_every": 0}
    more = solov2.train(
        TINY, data=paths, weights=read_checkpoint(result.last), output=tmp_path / "a", shapes=False, epochs=1, **quick
    )
    assert more.metrics == {} and more.best is None
    resumed = solov2.train(output=tmp_path / "a", resume=True, epochs=2, **quick)
    whole = solov2.train(TINY, data=paths, weights=result.last, output=tmp_path / "b", shapes=False, epochs=2, **quick)
    one, two = (read_checkpoint(each.last) for each in (resumed, whole))
    assert one.training.position == (2, 0)
    # Not the same weights: the cosine has another length, so the first epochs differ in the learning rate.
    assert one.weights.keys() == two.weights.keys() and one.class_names == two.class_names


def test_user_errors_are_exceptions(run, tmp_path):
    data, result = run
    for words, named in (
        ({"epoch": 3}, "'epoch'.*epochs"),
        ({"epochs": 0}, "train.epochs"),
        ({"data": {"train": "x"}}, "'train'"),
        ({"output": result.folder}, f"{result.folder} .*--overwrite"),
        ({"weights": "none.pth"}, "none.pth"),
        ({"device": "warp9"}, "warp9"),
        ({"resume": True}, str(tmp_path / "x")),
        ({"fpn_channels": 64, "weights": result.last}, "does not fit"),
    ):
        with pytest.raises(InputError, match=named):
            solov2.train(TINY, **{"data": data, "output": tmp_path / "x", "device": "cpu", **words})
    assert not (tmp_path / "x").exists()


def test_a_signal_is_an_exception_that_tells_how_to_resume(run, tmp_path, monkeypatch):
    data, _ = run

    def signaled(_path, **_options):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(3, 64, 64, dtype=torch.uint8)

    monkeypatch.setattr("solov2.data.image_dataset.read_image", signaled)
    with pytest.raises(Stopped, match=f"SIGTERM.*--output {tmp_path}") as stopped:
        solov2.train(TINY, data=data, output=tmp_path / "run", device="cpu", workers=0)
    assert stopped.value.code == STOPPED and isinstance(stopped.value, RunFailed)
    # The signal came while the first batch was read, so there was no step yet.
    assert read_checkpoint(tmp_path / "run" / "last.pth").training.position == (0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_fails_leaves_no_process(run, tmp_path, monkeypatch, workers):
    """Workers ignore the SIGTERM that Python sends them on exit, so a script would never end."""
    data, _ = run
    before = set(multiprocessing.active_children())
    with monkeypatch.context() as patch:
        patch.setattr("solov2.training.epochs.take_step", lambda *_arguments, **_options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            solov2.train(TINY, data=data, output=tmp_path / "run", device="cpu", workers=workers)
    assert set(multiprocessing.active_children()) == before


NO_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 MiB is free."
)


def test_exhausted_memory_loses_no_step(run, tmp_path, monkeypatch):
    data, _ = run
    settings = {"data": data, "device": "cpu", "epochs": 1, "workers": 0, "head_norm": "batch"}
    whole = solov2.train(TINY, output=tmp_path / "whole", **settings)
    forward, calls = training_step.forward, []

    def short_of_memory(*arguments):
        losses = forward(*arguments)  # changes the running statistics
        calls.append(losses)
        if len(calls) == 3:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "forward", short_of_memory)
        with pytest.raises(RunFailed, match=r"2\.00 GiB.* step 3.*--batch-size.*step 2.*--resume"):
            solov2.train(TINY, output=tmp_path / "run", **settings)
    resumed = solov2.train(TINY, output=tmp_path / "run", resume=True, **settings)
    for name in ("last", "best"):
        first, second = (read_checkpoint(getattr(result, name)).weights for result in (whole, resumed))
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(NO_MEMORY),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes."
        ),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError("Unable to allocate 2 GiB for an array"),
    ],
)
def test_commands_say_what_to_do_when_memory_runs_out(run, monkeypatch, capsys, tmp_path, error):
    data, result = run

    def forward(*_arguments):
        raise error

    monkeypatch.setattr("solov2.models.solov2.SOLOv2.forward", forward)
    shared = ["--weights", str(result.last), "--device", "cpu"]
    image = str(next((data / "val2017").iterdir()))
    assert eval_main([*shared, "--data-root", str(data), "--workers", "0"]) == 1
    assert predict_main([image, *shared, "--output", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: out of memory")]
    assert len(lines) == 2 and all("--batch-size" in line and "--precision bf16" in line for line in lines)


def test_a_thread_trains_and_leaves_signals_alone(run, tmp_path):
    """As in Streamlit and some notebooks."""
    data, result = run
    before = {number: signal.getsignal(number) for number in SIGNALS}
    found = []

    def call():
        settings = {"device": "cpu", "epochs": 2, "learning_rate": 0.001, "workers": 1}
        found.append(solov2.train(TINY, data=data, output=tmp_path / "run", **settings))
        found.append({number: signal.getsignal(number) for number in SIGNALS})
        found.append(train_main(["--resume", "--output", str(tmp_path / "run"), "--device", "cpu"]))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found[1:] == [before, 0] and found[0].metrics == result.metrics


def test_an_interruption_tells_whether_there_is_a_checkpoint(run, tmp_path, monkeypatch):
    data, _ = run

    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("solov2.training.epochs.take_step", interrupt)
    with pytest.raises(KeyboardInterrupt, match="interrupted; no checkpoint yet"):
        solov2.train(TINY, data=data, output=tmp_path / "run", device="cpu", workers=0)


def test_a_failed_resume_does_not_clear_the_folder(run, tmp_path):
    data, result = run
    (tmp_path / "run").mkdir()
    for name in ("log.jsonl", "mine.txt"):
        (tmp_path / "run" / name).touch()
    weights = tmp_path / "weights.pth"
    replace(read_checkpoint(result.last), training=None).save(weights)
    words = {"data": data, "output": tmp_path / "run", "device": "cpu", "overwrite": True}
    for more, named in (
        ({"resume": weights}, "weights.pth is not a checkpoint of a training run.*--weights"),
        ({"resume": ""}, "nothing to resume: . is not a file"),
        ({"resume": result.last, "epochs": 1}, "last.pth .* after 2 epochs, .* 1 epoch;.*--epochs"),
        ({"resume": result.last, "optimizer": "sgd"}, "adamw"),
    ):
        with pytest.raises(InputError, match=named):
            solov2.train(TINY, **words, **more)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.jsonl", "mine.txt"]


def test_an_explicit_path_takes_precedence_over_the_folder(tmp_path):
    kept, stale = "/elsewhere/a.json", "/old/train2017"
    config = override_config(TINY, {"train_annotations": kept, "train_images": stale})
    located = locate_data(config, tmp_path, chosen={"data.train_annotations": kept}).data
    assert (located.root, located.train_annotations, located.train_images) == (str(tmp_path), kept, "train2017")
