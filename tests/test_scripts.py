"""The scripts beside the tests: `--help` prints help and starts nothing, and missing files are named."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SCRIPTS = [*sorted((TESTS / "scripts").glob("*.py")), TESTS / "peer/compare.py", TESTS / "peer/detections.py"]
MISSING = {
    "photo_subset.py": (["no.json", "out"], "no.json"),
    "break_photos.py": (["no.json", "no", "out"], "no.json"),
    "lively_weights.py": (["solov2_light_r18_fpn_3x", "out.pth", "--image", "no.jpg"], "no.jpg"),
    "export_ap.py": (["no.pth", "--data-root", "no", "--size", "64", "64"], "no.pth"),
    "compare.py": (["nowhere", "python"], "nowhere"),
    "detections.py": (["nowhere", "python", "--images", "no", "--annotations", "no.json"], "peer.py"),
}


def run(path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """Run a script in an empty folder; returns its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not list(folder.iterdir())
    return int(ended.value.code or 0)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(path, ["--help"], monkeypatch, tmp_path) == 0
    assert f"usage: {path.name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", MISSING)
def test_missing_files_are_named(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    [path] = [path for path in SCRIPTS if path.name == name]
    words, missing = MISSING[name]
    assert run(path, words, monkeypatch, tmp_path) == 2
    assert missing in capsys.readouterr().err.splitlines()[-1]
