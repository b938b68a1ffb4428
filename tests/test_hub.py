"""Models go through a folder, as through the Hub, and come back equal; the card states what it was given."""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from helpers.tiny_models import TINY, tiny_model

import solov2
from solov2.build import build_model
from solov2.errors import InputError
from solov2.hub import from_pretrained, model_card, push_to_hub, write_folder
from solov2.models.solov2 import SOLOv2

HOSTILE = "a|b](x)\n```\n<script>alert(1)</script> \x1b[2J"


def assert_equal_models(model: SOLOv2, loaded: SOLOv2) -> None:
    assert (model.class_names, model.category_ids) == (loaded.class_names, loaded.category_ids)
    assert model.settings == loaded.settings and model.input_scale == loaded.input_scale
    theirs = loaded.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


class LocalHub:
    """Stands in for `huggingface_hub.HfApi`: repositories are folders below `root`."""

    root: ClassVar[Path]
    commits: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> None:
        if repo.count("/") != 1:
            raise RuntimeError(f"no repository is called {repo}")
        (self.root / repo).mkdir(parents=True, exist_ok=exist_ok)

    def file_exists(self, repo: str, name: str) -> bool:
        return (self.root / repo / name).is_file()

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, ignore_patterns: list[str] | None
    ) -> Any:
        for path in Path(folder_path).iterdir():
            if path.name not in (ignore_patterns or ()):
                shutil.copy(path, self.root / repo_id)
        self.commits.append({"message": commit_message, "token": self.token})
        return type("CommitInfo", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    monkeypatch.setattr(LocalHub, "root", tmp_path / "hub", raising=False)
    monkeypatch.setattr(LocalHub, "commits", [])

    def fetch(repo: str, name: str, *, revision: str | None, token: str | None) -> str:
        path = LocalHub.root / repo / name
        if not path.is_file():
            raise FileNotFoundError(f"404: no {repo}/{name}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", LocalHub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return tmp_path / "hub"


def test_a_pushed_model_comes_back_equal(hub: Path) -> None:
    model = tiny_model(score_threshold=0.25, input_scale=(160, 96))
    model.class_names, model.category_ids = ["cat", "dog", "ä"], [3, 5, 8]
    address = push_to_hub(model, "me/pets", license="apache-2.0", token="t", message="First")
    assert address == "https://hub/me/pets/commit/1" and LocalHub.commits == [{"message": "First", "token": "t"}]
    assert sorted(path.name for path in (hub / "me/pets").iterdir()) == ["README.md", "model.safetensors"]
    for loaded in (from_pretrained("me/pets"), from_pretrained(hub / "me/pets"), solov2.hub.from_pretrained("me/pets")):
        assert_equal_models(model, loaded)


def test_a_card_of_the_repository_is_kept(hub: Path) -> None:
    push_to_hub(tiny_model(), "me/pets")
    (hub / "me/pets/README.md").write_text("mine")
    changed = tiny_model(score_threshold=0.5)
    push_to_hub(changed, "me/pets")
    assert (hub / "me/pets/README.md").read_text() == "mine"
    assert_equal_models(changed, from_pretrained("me/pets"))


def test_mistakes_are_named(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x/y/z .*no repository"):
        push_to_hub(tiny_model(), "x/y/z")
    with pytest.raises(InputError, match="model.safetensors from me/absent .*404"):
        from_pretrained("me/absent")
    with pytest.raises(InputError, match="model.safetensors does not exist"):
        from_pretrained(tmp_path)
    with pytest.raises(InputError, match="optimized"):
        push_to_hub(tiny_model().optimize(), "me/fast")
    assert not (hub / "me/fast").exists()


def parts(card: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card, and its text."""
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_states_what_it_was_given(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = tiny_model()
    metadata, text = parts(model_card(model, "me/pets", None, {}))
    assert "license" not in metadata and metadata["library_name"] == "solov2"
    assert "None are stated" in text and "AP" not in text.replace("AP&#", "")
    assert 'from_pretrained("me/pets")' in text.replace("'", '"')
    [settings] = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    assert yaml.safe_load(settings)["model"]["grid_sizes"] == list(TINY["grid_sizes"])
    write_folder(model, tmp_path / "new", repo="me/pets", license="mit", figures={"mask AP, val": 37.5})
    metadata, text = parts((tmp_path / "new" / "README.md").read_text())
    assert metadata["license"] == "mit" and "| 37.5 |" in text and text.rstrip().endswith("mit")


def test_the_card_of_a_panoptic_model_names_its_stuff() -> None:
    model = build_model("solov2_panoptic_r50_fpn_1x", **TINY, stuff_names=["sky", "sea"], semantic_channels=32)
    metadata, text = parts(model_card(model, "me/pets", None, {}))
    assert "panoptic-segmentation" in metadata["tags"] and "Stuff: sky, sea." in text


def test_hostile_names_are_escaped() -> None:
    model = tiny_model()
    model.class_names = [HOSTILE, "b", "c"]
    card = model_card(model, f"me/{HOSTILE}", HOSTILE, {HOSTILE: 1.0})
    metadata, text = parts(card)
    assert metadata["license"] == HOSTILE
    assert "<script>" not in text.replace(ascii(f"me/{HOSTILE}"), "") and "\x1b" not in card
    assert sum(line.startswith("```") for line in card.splitlines()) == 4  # the two blocks of the card


@pytest.mark.parametrize("name", ["huggingface_hub", "safetensors"])
def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip(name)
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"solov2\[hub\]"):
        push_to_hub(tiny_model(), "me/pets")
    if name == "huggingface_hub":  # a folder needs no Hub
        pytest.importorskip("safetensors")
        tiny_model().save(tmp_path / "model.safetensors")
        assert_equal_models(tiny_model(), from_pretrained(tmp_path))


def test_the_hub_takes_these_arguments() -> None:
    """The stand-ins above are called as the real functions can be."""
    hub = pytest.importorskip("huggingface_hub")
    inspect.signature(hub.HfApi.create_repo).bind(None, "me/x", private=None, exist_ok=True)
    inspect.signature(hub.HfApi.file_exists).bind(None, "me/x", "README.md")
    words = {"repo_id": "me/x", "folder_path": "x", "commit_message": "x", "ignore_patterns": ["README.md"]}
    inspect.signature(hub.HfApi.upload_folder).bind(None, **words)
    inspect.signature(hub.hf_hub_download).bind("me/x", "model.safetensors", revision=None, token=None)
