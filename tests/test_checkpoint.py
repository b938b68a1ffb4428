"""Checkpoint files: written atomically, loaded safely, and rejected with a one-line message when broken."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from solov2.checkpoint import FORMAT, Checkpoint, TrainingState, load_file
from solov2.errors import InputError
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
        ("epoch", "3"), ("epoch", True), ("step", 1.5), ("best", None), ("random_states", torch.ones(2)),
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
