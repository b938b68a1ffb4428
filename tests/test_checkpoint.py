"""Checkpoint files: written atomically, loaded safely, and rejected with a one-line message when broken."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

from solov2 import build
from solov2.checkpoint import FORMAT, Checkpoint, TrainingState, load_file
from solov2.errors import InputError
from solov2.training.folder import newest_loadable, save_step
from solov2.training.optim import check_optimizer_state
from solov2.weights import read_checkpoint


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"head.category_predictor.bias": torch.full((2,), value)}


def state(**changes) -> TrainingState:
    values = {
        "weights": weights(2.0), "optimizer": {"state": {}, "param_groups": []}, "scaler": {}, "epoch": 3, "step": 1,
        "evaluated": 2, "best": 0.5, "global_batch": 4, "annotations_sha256": "ab", "updates": None,
        "random_states": [{"cpu": torch.get_rng_state()}],
    }  # fmt: skip
    return TrainingState(**{**values, **changes})


KNOWN = {"class_names": ["a", "b"], "category_ids": [1, 7], "config": {"x": [1, 2.5]}, "traits": {"modulated": True}}


def test_round_trip(tmp_path):
    Checkpoint("here", weights(), **KNOWN).save(tmp_path / "last.pth")
    loaded = read_checkpoint(tmp_path / "last.pth")
    assert {name: getattr(loaded, name) for name in KNOWN} == KNOWN and loaded.family == "solov2"
    assert loaded.source == str(tmp_path / "last.pth") and loaded.training is None
    assert torch.equal(loaded.weights["head.category_predictor.bias"], torch.ones(2))
    assert os.listdir(tmp_path) == ["last.pth"]


@pytest.mark.parametrize("updates", [None, 5])
def test_round_trip_of_a_run(tmp_path, updates):
    """With averaging, a checkpoint's weights are the average, and its training state holds the ones being trained."""
    saved = state(updates=updates)
    Checkpoint("here", weights() if updates else saved.weights, **KNOWN, training=saved).save(tmp_path / "last.pth")
    loaded = read_checkpoint(tmp_path / "last.pth")
    assert loaded.training.position == (3, 1) and loaded.training.updates == updates
    assert loaded.training.weights["head.category_predictor.bias"].tolist() == [2, 2]
    assert loaded.weights["head.category_predictor.bias"].tolist() == ([1, 1] if updates else [2, 2])


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pth"
    Checkpoint("here", weights()).save(path)
    with pytest.raises(Exception, match="pickle"):
        Checkpoint("here", weights(), traits={"bad": lambda: None}).save(path)
    assert read_checkpoint(path).traits == {} and os.listdir(tmp_path) == ["last.pth"]


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("model", None), ("model", {"a": 1}), ("model", {1: torch.ones(1)}), ("class_names", "ab"),
        ("class_names", [1, 2]), ("category_ids", ["1"]), ("config", [1]), ("traits", 3), ("optimizer", []),
        ("category_ids", [True]), ("config", {"train": 3}), ("config", {"train": {"epochs": torch.ones(1)}}),
        ("traits", {"modulated": torch.ones(1)}), ("conditions", {"threads": 3}), ("averaged", [torch.ones(1)]),
        ("epoch", "3"), ("epoch", True), ("epoch", -1), ("epoch", 10**30), ("step", 1.5), ("global_batch", 0),
        ("best", None), ("best", float("nan")), ("annotations_sha256", 3), ("updates", -1), ("stale", -1),
        ("scaler", {"scale": 2.0}), ("scaler", [1]),
        ("optimizer", {}), ("optimizer", {"state": {}, "param_groups": [3]}),
        ("optimizer", {"state": {0: {"step": "x"}}, "param_groups": []}),
        ("optimizer", {"state": {}, "param_groups": [{"params": [0], "lr": torch.ones(1)}]}),
        ("random_states", torch.ones(2)), ("random_states", [{}]), ("random_states", [{"cpu": torch.ones(2)}]),
        ("random_states", [{"cpu": torch.zeros(7, dtype=torch.uint8)}]),
    ],
)  # fmt: skip
def test_errors_name_the_entry_of_the_wrong_type(tmp_path, entry, value):
    content = Checkpoint("here", weights(), **KNOWN, training=state()).content()
    torch.save({**content, entry: value}, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=rf"damaged.pth.*'{entry}'"):
        read_checkpoint(tmp_path / "damaged.pth")
    torch.save({key: item for key, item in content.items() if key != "step"}, tmp_path / "half.pth")
    half = read_checkpoint(tmp_path / "half.pth")  # its weights are usable, but the run cannot be resumed
    assert half.training is None and half.weights["head.category_predictor.bias"].tolist() == [2, 2]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb",)


def test_rejected_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.pth"
    torch.save({"format": FORMAT, "model": {"weight": torch.zeros(10000)}}, good)
    (tmp_path / "truncated.pth").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    torch.save([1], tmp_path / "list.pth")
    for name in ("truncated.pth", "text.pth", "empty.pth", "bomb.pth", "bomb.pkl", "list.pth", "missing.pth"):
        with pytest.raises(InputError, match=name) as error:
            load_file(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "bomb").exists()


def test_old_format_without_zip(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_file(tmp_path / "old.pth")["state_dict"]["w"], torch.ones(2))


def archive() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.randn(8), "b": torch.randn(3).half()}, "number": 1.5}, buffer)
    return buffer.getvalue()


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """In the data of a tensor it is always refused; in the directory, one bit tells torch not to read a record."""
    path, data = tmp_path / "flipped.pth", archive()
    with zipfile.ZipFile(io.BytesIO(data)) as content:
        places = {record.filename.partition("/")[2]: data.index(content.read(record)) for record in content.infolist()}
        directory = content.start_dir
    path.write_bytes(data)
    whole = load_file(path)
    attributes = [place + 38 for place in range(directory, len(data)) if data[place:].startswith(b"PK\x01\x02")]
    assert len(attributes) == len(places)
    in_data = range(8 * places["data/0"], 8 * places["data/0"] + 256)
    bits = {*in_data, *(8 * place + 4 for place in attributes), *random.Random(0).sample(range(8 * len(data)), 300)}
    refused = set()
    for bit in bits:
        path.write_bytes(flipped(data, bit))
        try:
            loaded = load_file(path)
        except InputError as error:
            refused.add(bit)
            assert "flipped.pth" in str(error) and "\n" not in str(error)
            assert bit not in in_data or "data/0" in str(error)
        else:
            assert loaded["number"] == whole["number"] and loaded["model"].keys() == whole["model"].keys()
            assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in whole["model"].items())
    assert refused >= {*in_data, *(8 * place + 4 for place in attributes)} and refused != bits


def test_resume_uses_the_checkpoint_before_the_damaged_one(tmp_path: Path) -> None:
    """last.pth is a hard link to the damaged file: both are named, and the step before is loaded."""
    for step in (1, 2):
        save_step(tmp_path, step, Checkpoint("here", weights(float(step))), keep=2)
    path = tmp_path / "step_00000002.pth"
    data = path.read_bytes()
    place = data.index(torch.full((2,), 2.0).numpy().tobytes())
    with path.open("r+b") as file:
        file.write(flipped(data, 8 * place + 5))
    checkpoint, unreadable = newest_loadable(tmp_path)
    assert checkpoint.source == str(tmp_path / "step_00000001.pth")
    assert [name in reason for name, reason in zip(("last.pth", path.name), unreadable, strict=True)] == [True, True]
    assert "CRC-32" in unreadable[0]


def test_files_without_checksums_load_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"state_dict": {"w": torch.ones(2)}}
    torch.save(content, tmp_path / "good.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    torch.save(content, tmp_path / "unchecked.pth")
    torch.serialization.set_crc32_options(True)
    for name, number in (("good.pth", 0), ("old.pth", 1), ("unchecked.pth", 2)):
        assert torch.equal(load_file(tmp_path / name)["state_dict"]["w"], torch.ones(2))
        assert len(caplog.records) == number and (not number or name in caplog.messages[-1])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    bad, name = {"head.category_predictor.bias": torch.tensor([1.0, value])}, "head.category_predictor.bias has 1 value"
    moments = {"state": {3: {"exp_avg": torch.tensor([value])}}, "param_groups": []}
    for checkpoint, message in (
        (Checkpoint("here", bad), name),
        (Checkpoint("here", weights(), **KNOWN, training=state(weights=bad, updates=1)), name),
        (Checkpoint("here", state().weights, **KNOWN, training=state(optimizer=moments)), "exp_avg of parameter 3"),
    ):
        checkpoint.save(tmp_path / "bad.pth")
        with pytest.raises(InputError, match=f"bad.pth .*{message}"):
            read_checkpoint(tmp_path / "bad.pth")
    large = {"head.category_predictor.bias": torch.full((4,), 3e38)}  # only their sum overflows
    Checkpoint("here", large).save(tmp_path / "large.pth")
    assert torch.equal(read_checkpoint(tmp_path / "large.pth").weights["head.category_predictor.bias"], *large.values())


@pytest.mark.parametrize("changes", [{"pixel_mean": [1, 2]}, {"channel_order": 3}, {"modulated": "x"}])
def test_traits_are_checked_when_read(tmp_path: Path, changes: dict) -> None:
    Checkpoint("here", weights(), traits=changes).save(tmp_path / "bad.pth")
    with pytest.raises(InputError, match=f"bad.pth .*model.{next(iter(changes))}"):
        read_checkpoint(tmp_path / "bad.pth")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "folder.pth").mkdir()
    for name in ("fifo.pth", "folder.pth", "/dev/zero"):
        with pytest.raises(InputError, match=f"{name} is not a regular file"):
            load_file(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        load_file(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_category_layers_have_a_number_per_class(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """In the weights being trained as well as in their average."""
    bad = {"head.category_predictor.bias": torch.ones(shape)}
    for checkpoint in (
        Checkpoint("here", bad),
        Checkpoint("", weights(), training=state(weights=bad, updates=1), **KNOWN),
    ):
        checkpoint.save(tmp_path / "bad.pth")
        with pytest.raises(InputError, match=f"bad.pth .*category layer .*{list(shape)}".replace("[", r"\[")):
            read_checkpoint(tmp_path / "bad.pth")


def adamw() -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "no complete state of parameter 1"),
        ({"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 2)}, "no complete state of parameter 1"),
        ({"step": 1, "exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.ones(2, 2)}, "step of parameter 1"),
        ({"step": torch.tensor(1.0), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(2, 2)}, "exp_avg .* 1"),
        ({"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 2), "exp_avg_sq": None}, "exp_avg_sq .* 1"),
    ],
)
def test_optimizer_states_fit_their_parameters(entries: dict, message: str) -> None:
    optimizer = adamw()
    saved = optimizer.state_dict()
    check_optimizer_state(optimizer, saved)
    with pytest.raises(ValueError, match=message):
        check_optimizer_state(optimizer, {**saved, "state": {**saved["state"], 1: entries}})
    group = saved["param_groups"][0]
    for changes in ({"params": [0]}, {"params": [0, 10**30]}, {"lr": None}):
        with pytest.raises(ValueError, match="other parameters|learning rate"):
            check_optimizer_state(optimizer, {**saved, "param_groups": [{**group, **changes}]})


def test_no_memory_is_taken_for_a_network_that_the_weights_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few kilobytes whose configuration describes a network of 100 GB."""
    config = {"model": {"tower_channels": 16384, "tower_depth": 12}}
    Checkpoint("here", weights(), config=config).save(tmp_path / "huge.pth")

    def construct(*arguments: object) -> object:
        assert torch.get_default_device().type == "meta"
        return real(*arguments)

    real = build.construct
    monkeypatch.setattr(build, "construct", construct)
    with pytest.raises(InputError, match="huge.pth does not fit this model"):
        build.build_model(weights=tmp_path / "huge.pth")
