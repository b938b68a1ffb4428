"""Models that are saved and loaded again are equal, in both formats; safetensors files of others are converted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import TINY, lively, numbered, tiny_model
from torch import Tensor

import solov2
from solov2.build import add_auxiliary_head, build_model
from solov2.checkpoint import TrainingState, load_file
from solov2.commands.convert import main
from solov2.config import Config, load_config, override_config, replace_model
from solov2.convert import to_mmdet
from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.weights import read_checkpoint

SUFFIXES = (".pth", ".safetensors")


def assert_equal_models(model: SOLOv2, loaded: SOLOv2) -> None:
    for name in ("class_names", "category_ids", "stuff_names", "stuff_category_ids", "channel_order", "input_scale"):
        assert getattr(model, name) == getattr(loaded, name), name
    assert model.settings == loaded.settings and model.panoptic_settings == loaded.panoptic_settings
    assert torch.equal(model.pixel_mean, loaded.pixel_mean) and torch.equal(model.pixel_std, loaded.pixel_std)
    theirs = loaded.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def picture() -> Tensor:
    return torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def saved(folder: Path, suffix: str, model: SOLOv2) -> Path:
    """Path of a saved model in a new folder."""
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    model.save(folder / "new" / f"model{suffix}")
    return folder / "new" / f"model{suffix}"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("variant", ["basic blocks", "DCNv1", "nothing frozen, batch norm"])
def test_a_loaded_model_equals_the_saved_one(tmp_path: Path, suffix: str, variant: str) -> None:
    model = lively(tiny_model(variant, score_threshold=0.0, input_scale=(160, 96), channel_order="bgr"))
    model.class_names, model.category_ids = ["ä|b", "b", "c"], list(np.array([7, 9, 11]))
    model.settings = replace(model.settings, max_instances=5)
    loaded = solov2.load(saved(tmp_path, suffix, model))
    assert_equal_models(model, loaded)
    assert not loaded.training and loaded.settings.max_instances == 5
    [result], [again] = model.predict(picture()), loaded.predict(picture())
    assert len(result["scores"]) == 5
    assert all(torch.equal(result[name], again[name]) for name in result)
    loaded.save(tmp_path / f"again{suffix}")  # once more, over the file that it came from
    assert_equal_models(model, solov2.load(tmp_path / f"again{suffix}"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_panoptic_models_keep_their_stuff(tmp_path: Path, suffix: str) -> None:
    stuff = {"stuff_names": ["sky", "sea"], "semantic_channels": 32, "stuff_area_limit": 9}
    model = build_model("solov2_panoptic_r50_fpn_1x", **TINY, **stuff)
    model.stuff_category_ids = [40, 41]
    loaded = solov2.load(saved(tmp_path, suffix, model))
    assert_equal_models(model, loaded)
    assert loaded.semantic_head is not None and loaded.panoptic_settings.stuff_area_limit == 9


def test_files_have_the_configuration_and_nothing_of_a_run(tmp_path: Path) -> None:
    """No path of the user's either, nor the head of an auxiliary loss."""
    config = Config("mine", replace_model(load_config("solov2_light_r18_fpn_3x").model, TINY))
    config = override_config(config, {"data.root": "/home/me/secret", "train.semantic_auxiliary": 0.5})
    model = add_auxiliary_head(build_model(config, device="cpu"), config)
    model.save(tmp_path / "model.pth")
    content = load_file(tmp_path / "model.pth")
    assert set(content) == {"format", "model", "config", "traits", "class_names", "category_ids"}
    assert content["config"].keys() == {"name", "model"} and content["config"]["name"] == "mine"
    assert not any("auxiliary" in name for name in content["model"])
    assert b"secret" not in (tmp_path / "model.pth").read_bytes()
    assert_equal_models(build_model(config, weights=tmp_path / "model.pth"), solov2.load(tmp_path / "model.pth"))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="optimized"):
        tiny_model().optimize().save(tmp_path / "model.pth")
    state = TrainingState(
        {}, {}, {}, epoch=1, step=0, evaluated=0, best=-1, global_batch=1, annotations_sha256="", random_states=[]
    )
    with pytest.raises(InputError, match="x.safetensors.*run.*.pth"):
        replace(numbered(1), training=state).save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- safetensors


def test_convert_writes_and_reads_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of others are recognized by their names, and what mmdetection would not read is not written."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny_model()
    safetensors.save_file(to_mmdet(model.state_dict()), tmp_path / "theirs.safetensors")
    assert read_checkpoint(tmp_path / "theirs.safetensors").family == "mmdet"
    assert main([str(tmp_path / "theirs.safetensors"), str(tmp_path / "ours.pth")]) == 0
    assert main([str(tmp_path / "ours.pth"), str(tmp_path / "ours.safetensors")]) == 0
    loaded = build_model("solov2_light_r18_fpn_3x", weights=tmp_path / "ours.safetensors", **TINY)
    assert_equal_models(model, loaded)
    assert main([str(tmp_path / "ours.pth"), str(tmp_path / "no.safetensors"), "--to", "mmdet"]) == 2
    assert "mmdet" in capsys.readouterr().err and not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("kind", ["truncated", "header", "entries", "deep", "number", "NaN"])
def test_damaged_safetensors_files_are_refused(tmp_path: Path, kind: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path, model = tmp_path / "x.safetensors", tiny_model()
    model.save(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "header":
        path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    else:
        tensors = safetensors.load_file(path)
        headers = {
            "entries": json.dumps({"format": "solov2", "class_names": [1]}),
            "deep": "[" * 100_000,
            "number": "1",
            "NaN": json.dumps({"format": "solov2"}),
        }
        if kind == "NaN":
            tensors["fpn.output.0.bias"] = tensors["fpn.output.0.bias"] * torch.nan
        safetensors.save_file(tensors, path, {"solov2": headers[kind]})
    with pytest.raises(InputError, match="x.safetensors"):
        read_checkpoint(path)


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    jobs: list[Any] = [lambda path: tiny_model().save(path), read_checkpoint]
    for job in jobs:
        with pytest.raises(InputError, match=r"x.safetensors: .*solov2\[hub\]") as error:
            job(tmp_path / "x.safetensors")
        assert "\n" not in str(error.value)
