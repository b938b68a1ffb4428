"""Checkpoint files: atomic, safe, and refused in one sentence when broken."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from solov2.checkpoint import is_own, latest_checkpoint, load_file, save_checkpoint
from solov2.config import InputError


def test_round_trip(tmp_path):
    content = {"model": {"weight": torch.arange(3.0)}, "epoch": 4, "class_names": ["a", "b"], "config": {"x": [1, 2.5]}}
    save_checkpoint(tmp_path / "last.pth", content)
    loaded = load_file(tmp_path / "last.pth")
    assert is_own(loaded) and loaded["epoch"] == 4 and loaded["config"] == content["config"]
    assert torch.equal(loaded["model"]["weight"], content["model"]["weight"])
    assert latest_checkpoint(tmp_path) == tmp_path / "last.pth"
    assert os.listdir(tmp_path) == ["last.pth"]


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"epoch": 2, "bad": lambda: None})
    assert load_file(path)["epoch"] == 1 and os.listdir(tmp_path) == ["last.pth"]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb",)


def test_refused_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.pth"
    save_checkpoint(good, {"model": {"weight": torch.zeros(10000)}})
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
