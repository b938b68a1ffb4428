"""The tiny run of `tiny_runs.py` with a semantic branch, on generated panoptic shapes."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny_runs import SETTINGS
from solov2.config import Config, load_config

PANOPTIC = (*SETTINGS, "model.stuff_area_limit=32", "model.semantic_channels=32", "model.panoptic_score_threshold=0.01")


def panoptic_config(*changes: str) -> Config:
    """The tiny panoptic configuration, with `changes` applied."""
    return load_config("quickstart_panoptic", [*PANOPTIC, *changes])


def panoptic_arguments(root: Path, output: Path, *more: str) -> list[str]:
    """The tiny panoptic run's command line for train.py; the dataset at `root` is generated on first use."""
    settings = [word for setting in PANOPTIC for word in ("--set", setting)]
    return [
        "quickstart_panoptic",
        *settings,
        "--data-root",
        str(root),
        "--output",
        str(output),
        "--device",
        "cpu",
        *more,
    ]
