"""The training loop that docs/training_loop.md shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from solov2.data.shapes import generate_shapes


def test_the_training_loop_of_the_docs(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fewer shapes than the quickstart's: it trains, and ends with the results of the first validation image."""
    [code] = re.findall(r"^```python\n(.*?)^```$", (repo_root / "docs/training_loop.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    generate_shapes("data/shapes", train_images=16, val_images=2, size=192, seed=0)
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    exec(compile(code, "docs/training_loop.md", "exec"), names)

    [result] = names["results"]
    count = len(result["scores"])
    assert result["masks"].shape == (count, 192, 192) and result["masks"].dtype == torch.bool
    assert result["labels"].shape == (count,) and result["boxes"].shape == (count, 4)
    assert set(names["losses"]) == {"loss_category", "loss_mask"}
    assert all(loss.isfinite() for loss in names["losses"].values())
    steps = {state["step"].item() for state in names["optimizer"].state.values()}
    assert steps == {4}  # two epochs of two batches of eight
