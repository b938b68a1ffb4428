"""torch.hub finds every model of a checkout."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

import solov2


def test_every_model_is_an_entry_point(repo_root: Path) -> None:
    models, found = solov2.list_models(), runpy.run_path(f"{repo_root}/hubconf.py")
    model = torch.hub.load(str(repo_root), "quickstart", source="local", num_classes=3)
    assert isinstance(model, solov2.SOLOv2) and model.num_classes == 3
    assert all(callable(found[name]) for name in models)
