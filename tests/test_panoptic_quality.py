"""The command that compares two panoptic files: its figures, its table, its outputs and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.panoptic_files import PanopticTree, paint

from solov2.commands import panoptic_quality
from solov2.commands.main import main


@pytest.fixture
def tree(tmp_path: Path) -> PanopticTree:
    """Ground truth and, in found.json, itself as prediction, without crowds."""
    tree = PanopticTree(tmp_path)
    tree.content["categories"][0]["name"] = "bus\x1b[2J"
    tree.write()
    shutil.copytree(tree.segments, tmp_path / "found")
    found = json.loads(tree.file.read_text())
    infos = found["annotations"][0]["segments_info"]
    del infos[1]
    (tmp_path / "found.json").write_text(json.dumps({"annotations": found["annotations"]}))
    tree.segments, truth = tmp_path / "found", tree.segments
    tree.save("1.png", paint(infos))
    tree.segments = truth
    return tree


def run(tree: PanopticTree, *words: str) -> int:
    return main(["panoptic-quality", str(tree.file), str(tree.file.with_name("found.json")), *words])


PERFECT = {"pq": 1.0, "sq": 1.0, "rq": 1.0}


def test_figures(tree: PanopticTree, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "quality.json"
    assert run(tree, "--json", str(path)) == 0
    expected = {group: {**PERFECT, "n": number} for group, number in (("all", 5), ("things", 2), ("stuff", 3))}
    assert json.loads(path.read_text()) == expected
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows == [
        ["PQ", "SQ", "RQ", "N"],
        *([n, *["100.0"] * 3, k] for n, k in zip(("All", "Things", "Stuff"), "523")),
    ]
    assert err == ""


def test_json_on_the_screen_and_a_class_that_does_not_occur(
    tree: PanopticTree, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number in (1, 3):  # only grass is left
        tree.content["annotations"][number - 1]["segments_info"] = []
        tree.save(f"{number}.png", np.zeros((48, 64), np.int32))
    tree.write()
    shutil.rmtree(tmp_path / "found")
    assert (
        run(tree, "--json", "-", "--per-class", "--pred-segments", str(tree.segments)) == 2
    )  # segments without pixels
    assert "error: " in capsys.readouterr().err
    shutil.copy(tree.file, tmp_path / "found.json")
    assert run(tree, "--json", "-", "--per-class", "--pred-segments", str(tree.segments)) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["things"] == {"pq": None, "sq": None, "rq": None, "n": 0} and summary["stuff"] == {**PERFECT, "n": 1}
    assert summary["per_class"]["grass"] == {**PERFECT, "tp": 1, "fp": 0, "fn": 0}
    assert summary["per_class"]["car"] == {"pq": None, "sq": None, "rq": None, "tp": 0, "fp": 0, "fn": 0}
    assert r"bus\x1b[2J" in err and "\x1b" not in err and err.splitlines()[2].split() == ["Things", "-", "-", "-", "0"]


def test_mistakes(tree: PanopticTree, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found, png = tmp_path / "found.json", tree.segments / "1.png"
    before = [path.read_bytes() for path in (tree.file, found, png)]
    for words in (
        ["--json", str(tree.file)],
        ["--json", str(found), "--overwrite"],
        ["--json", str(png), "--overwrite"],
    ):
        assert run(tree, *words) == 2
        assert words[1] in capsys.readouterr().err
    assert [path.read_bytes() for path in (tree.file, found, png)] == before
    (tmp_path / "found" / "2.png").unlink()
    assert run(tree) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.startswith("error: ")
        and len(err.splitlines()) == 1
        and str(tmp_path / "found" / "2.png") in err
    )
    shutil.rmtree(tmp_path / "found")
    assert run(tree) == 2 and str(tmp_path / "found") in capsys.readouterr().err
    assert run(tree, "--nonsense") == 2


def test_the_figures_are_not_lost_with_a_file(
    tree: PanopticTree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(path: str, *_content: object, **_options: object) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(panoptic_quality, "write_json", full)
    assert run(tree, "--json", "x.json") == 2
    out, err = capsys.readouterr()
    assert "100.0" in out and err.splitlines()[-1].startswith("error: x.json")
