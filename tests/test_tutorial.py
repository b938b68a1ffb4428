"""examples/tutorial.ipynb: its cells are plain Python, and run from top to bottom with smaller settings."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = "TRAIN_IMAGES = 16\nVAL_IMAGES = 2\nEPOCHS = 1\n"


@pytest.fixture(scope="module")
def notebook(repo_root: Path) -> dict[str, Any]:
    return json.loads((repo_root / "examples/tutorial.ipynb").read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_valid_and_small(notebook: dict[str, Any], repo_root: Path) -> None:
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] == 5
    for cell in notebook["cells"]:
        wanted = {"id", "cell_type", "metadata", "source"}
        assert cell.keys() == wanted | ({"execution_count", "outputs"} if cell["cell_type"] == "code" else set())
    assert (repo_root / "examples/tutorial.ipynb").stat().st_size < 200_000
    errors = [out for cell in notebook["cells"] for out in cell.get("outputs", []) if out["output_type"] == "error"]
    assert not errors


def test_the_settings_are_those_that_this_test_replaces(notebook: dict[str, Any]) -> None:
    def names(code: str) -> list[str]:
        return [target.id for line in ast.parse(code).body for target in line.targets]

    assert names(code_cells(notebook)[0]) == names(SMALL)


def test_the_notebook_runs(notebook: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate([SMALL, *code_cells(notebook)[1:]]):
        # Jupyter shows the value of a last line that is an expression; the last such value is the picture.
        body = ast.parse(code).body
        last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
        shown = eval(compile(last, f"cell {number}", "eval"), names) if last else None
        if shown is not None:
            names["shown"] = shown

    assert names["shown"].size == (384, 384)  # the picture, enlarged twice
    count = len(names["found"]["scores"])
    assert names["masks"].shape == (count, 192, 192) and len(names["areas"]) == count
    assert torch.equal(names["again"]["masks"], names["found"]["masks"])
    assert -1 <= names["result"].metrics["segm_AP"] <= 1 and len(names["photographs"]) == 2
