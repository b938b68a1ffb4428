"""solov2 weights: the table of published files, fetching one, and saying what a file is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import TINY, tiny_model
from torch import Tensor

from solov2 import identify as identification
from solov2 import published
from solov2.build import build_model, construct
from solov2.checkpoint import Checkpoint
from solov2.commands.main import main
from solov2.config import Config, load_config, replace_model
from solov2.convert import to_mmdet
from solov2.data.categories import default_class_names
from solov2.download import MIRROR, sha256_of
from solov2.identify import fitting_models, identify
from solov2.published import PUBLISHED_FILES, PublishedFile

NAME = "solov2_light_r18_fpn_3x"


@pytest.fixture(autouse=True)
def few_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the tests tell apart; each takes a while to build."""
    names = ["quickstart", "solov2_r50_fpn_1x", "solov2_r50_fpn_3x", "solov2_light_r50_dcn_fpn_3x"]
    monkeypatch.setattr(identification, "list_models", lambda: [*names, "solov2_panoptic_r50_fpn_1x"])


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedFile:
    """A small file, published for NAME, that is found in the mirror alone."""
    (tmp_path / "mirror").mkdir()
    path = tmp_path / "mirror" / "theirs.pth"
    Checkpoint("theirs", build_model("quickstart").state_dict()).save(path)
    file = PublishedFile(NAME, "mmdet", ("http://127.0.0.1:9/theirs.pth",), 29.7, "Apache-2.0", sha256_of(path))
    for module in (published, identification):
        monkeypatch.setattr(module, "PUBLISHED_FILES", (file,))
    monkeypatch.setattr(published, "PUBLISHED_WEIGHTS", {NAME: file})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    return file


def test_list_has_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The official ones have the AP that the models' table shows."""
    assert main(["weights", "list", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["file"] for row in rows] == [file.name for file in PUBLISHED_FILES] and len(err.splitlines()) == 20
    assert main(["models", "--json", "-"]) == 0
    table = {row["model"]: row["mask_AP"] for row in json.loads(capsys.readouterr().out)}
    official = {row["model"]: row["mask_AP"] for row in rows if row["official"]}
    assert official == {name: figure for name, figure in table.items() if figure is not None}
    assert {row["license"] for row in rows} == {"Apache-2.0", "academic use"}


def test_fetch_prints_the_path(theirs: PublishedFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "fetch", NAME]) == 0
    assert capsys.readouterr().out == f"{theirs.cached}\n" and sha256_of(theirs.cached) == theirs.sha256
    target = tmp_path / "new" / "copy.pth"
    assert main(["weights", "fetch", f"{NAME}:mmdet", "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n" and sha256_of(target) == theirs.sha256
    assert main(["weights", "fetch", NAME, "--output", str(target)]) == 2
    assert "already exists" in capsys.readouterr().err
    theirs.cached.unlink()
    (tmp_path / "mirror" / "theirs.pth").unlink()
    assert main(["weights", "fetch", NAME]) == 1
    assert "127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("fetch", "the name of a model"),
        ("verify", "a file"),
        ("list x", "no other argument"),
        ("list --output x", "--output"),
        ("fetch solov2_r50", "solov2_r50_fpn_1x"),
        ("fetch solov2_r50_fpn_1x:adelaidet", "official:mmdet, official:authors"),
        ("verify absent.pth", "absent.pth does not exist"),
        ("burn", "fetch"),
    ],
)
def test_mistakes(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err


def test_verify_names_what_a_file_is(theirs: PublishedFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mirror" / "theirs.pth"
    assert main(["weights", "verify", str(source), "--json", str(tmp_path / "x.json")]) == 0
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["family"] == "solov2" and report["models"] == ["quickstart"] and report["own_model"] is None
    assert report["published"]["file"] == "theirs.pth" and report["sha256"] == theirs.sha256
    assert theirs.sha256 in capsys.readouterr().out

    torch.save({"state_dict": to_mmdet(tiny_model().state_dict())}, source)  # fits no model, and has another hash
    assert main(["weights", "verify", str(source)]) == 1
    out = capsys.readouterr().out
    assert "no model" in out and "not theirs.pth of mmdet" in out
    source.write_bytes(source.read_bytes()[:-100])
    assert main(["weights", "verify", str(source)]) == 1
    assert "theirs.pth cannot be read" in capsys.readouterr().err


def test_our_files_fit_their_own_configuration(tmp_path: Path) -> None:
    config = Config("mine", model=replace_model(load_config(NAME).model, TINY))
    Checkpoint("mine", tiny_model().state_dict(), config=config.to_dict()).save(tmp_path / "mine.pth")
    found = identify(tmp_path / "mine.pth")
    assert (found.family, found.own_model, found.models) == ("solov2", "mine", [])
    assert found.published is None and not found.expected


def shapes_of(name: str, **changes: Any) -> dict[str, Tensor]:
    """The state of a model without storage."""
    config = replace_model(load_config(name).model, changes)
    with torch.device("meta"):
        return construct(config, default_class_names(config.num_classes)).state_dict()


def test_models_with_one_network_fit_the_same_file() -> None:
    """Other sizes and other traits do not fit or are taken from the file; a missing semantic head does not fit."""
    weights = shapes_of("solov2_r50_fpn_1x", num_classes=5)
    light, tiny = shapes_of("solov2_light_r50_dcn_fpn_3x", modulated=False), shapes_of("solov2_r50_fpn_1x", **TINY)
    r50 = ["solov2_r50_fpn_1x", "solov2_r50_fpn_3x"]
    assert fitting_models(Checkpoint("a", weights, traits={"stride_in_1x1": True})) == r50
    assert fitting_models(Checkpoint("b", light, traits={"modulated": False})) == ["solov2_light_r50_dcn_fpn_3x"]
    assert fitting_models(Checkpoint("c", tiny)) == []
    del weights["fpn.output.0.bias"]
    assert fitting_models(Checkpoint("d", weights)) == []


def test_the_tables_of_the_documents_have_the_figures_of_the_files(repo_root: Path) -> None:
    """The README shows what `official` fetches, docs/weights.md every file, the official one first."""
    rows = re.findall(r"^\| (solov2_\w+) \| [\d.]+ M \| ([\d.]+) \|", (repo_root / "README.md").read_text(), re.M)
    assert {name: float(figure) for name, figure in rows} == {
        name: file.mask_ap for name, file in published.PUBLISHED_WEIGHTS.items()
    }
    table = re.findall(r"^\| (solov2_\w+) \| (.*) \|$", (repo_root / "docs" / "weights.md").read_text(), re.M)
    files = [(name, *found) for name, text in table for found in re.findall(r"(\w+) (\d\d\.\d)", text)]
    assert files == [(file.model, file.family, f"{file.mask_ap:.1f}") for file in PUBLISHED_FILES]
