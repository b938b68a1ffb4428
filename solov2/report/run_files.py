"""What a run has left on disk: its best checkpoint, its log, and the annotations that it was trained with."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from solov2.checkpoint import Checkpoint
from solov2.config import Config
from solov2.data.annotations import parse_json
from solov2.data.build import split_paths
from solov2.data.class_matching import match_names
from solov2.errors import InputError
from solov2.training.folder import newest_loadable
from solov2.weights import read_checkpoint


def read_run(run: str | Path) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """The best checkpoint of a run folder, else its newest, or a checkpoint file; and the log beside it.

    Raises:
        InputError: there is no readable checkpoint.
    """
    path = Path(run)
    if not path.exists():
        raise InputError(f"{path} does not exist; name the folder of a run, such as runs/quickstart, or a checkpoint")
    if path.is_file():
        return read_checkpoint(path), read_log(path.parent)
    if (path / "best.pth").is_file():
        return read_checkpoint(path / "best.pth"), read_log(path)
    checkpoint, unreadable = newest_loadable(path)
    if checkpoint is None:
        reason = f" ({unreadable[0]})" if unreadable else ""
        raise InputError(f"{path} has no readable checkpoint{reason}; name the folder of a run, or a checkpoint file")
    return checkpoint, read_log(path)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl, without those that cannot be read, such as one that a kill cut off."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (folder / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def count_training(config: Config, categories: Mapping[int, str]) -> Counter[int]:
    """Category id -> number of instances, or of panoptic segments, in training; empty if the file is not there.

    Args:
        config: names the file.
        categories: id -> name of the classes that are evaluated; the other file may number them differently.
    """
    try:
        content = parse_json(split_paths(config.data, "train")[0])
        entries = [entry for x in content["annotations"] for entry in x.get("segments_info", [x])]
        crowds = config.data.crowd == "instance"  # count, then
        counts = Counter(entry["category_id"] for entry in entries if crowds or not entry.get("iscrowd"))
        known = sorted((x["id"], x["name"]) for x in content["categories"])
    except (InputError, KeyError, TypeError, AttributeError):  # moved or changed since the training
        return Counter()
    names = dict(sorted(categories.items()))
    matches = match_names([*names.values()], [name for _, name in known])
    return Counter({category: counts[known[at][0]] for category, at in zip(names, matches) if at is not None})


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a log can be drawn: not NaN, infinite or beyond what a sum of floats holds."""
    return isinstance(value, int | float) and abs(value) < 1e30
