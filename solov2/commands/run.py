"""A training run: what belongs together, its folder, its checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from solov2 import distributed
from solov2.build import load_weights, traits_of
from solov2.checkpoint import is_own, latest_checkpoint, load_file, save_checkpoint
from solov2.config import Config, InputError
from solov2.data.coco import CocoInstances
from solov2.logger import RunLogger
from solov2.models.solov2 import SOLOv2


@dataclass
class Run:
    """What belongs together while a run goes on."""

    config: Config
    folder: Path
    device: torch.device
    model: SOLOv2
    dataset: CocoInstances
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    logger: RunLogger
    epoch: int = 0  # epochs done
    best: float = -1.0  # mask AP of the best evaluation so far

    def content(self) -> dict[str, Any]:
        """Everything a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "config": self.config.to_dict(),
            "traits": traits_of(self.config.model),
            "class_names": self.model.class_names,
            "category_ids": self.dataset.category_ids,
            "epoch": self.epoch,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


def check_folder(folder: Path, resume: str | None, overwrite: bool) -> Path | None:
    """Path of the checkpoint to resume; refuses to touch another run's folder. Nothing is written yet."""
    if resume is not None:
        path = latest_checkpoint(folder) if resume == "auto" else Path(resume)
        if path is None:
            raise InputError(f"nothing to resume: {folder} holds no last.pth")
        return path
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run folder {folder} is a file; name another with --output")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"no permission to write to {existing}; name another run folder with --output")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not overwrite:
        raise InputError(
            f"run folder {folder} already holds files; go on with --resume, replace them with --overwrite, "
            "or name another folder with --output"
        )
    if not (folder / "log.jsonl").exists():
        raise InputError(f"{folder} is not a run folder (it has no log.jsonl), so --overwrite leaves it alone")
    return None


def open_folder(folder: Path, config: Config, *, overwrite: bool) -> None:
    """Make the run folder and write the resolved configuration into it."""
    if distributed.is_main():
        try:
            if overwrite and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
        except OSError as error:
            raise InputError(
                f"cannot write to run folder {folder}: {error.strerror}; name another with --output"
            ) from error
    distributed.barrier()


def resume(run: Run, path: Path) -> None:
    """Put a run back to where a checkpoint was written.

    Raises:
        InputError: not a checkpoint of a run, or of another model, other classes or another optimiser.
    """
    content = load_file(path)
    if not is_own(content) or "optimizer" not in content:
        raise InputError(f"{path} is no checkpoint of a training run; start from its weights with --weights")
    if content["class_names"] != run.model.class_names:
        raise InputError(
            f"{path} was trained on other classes: {class_difference(content['class_names'], run.model.class_names)}"
        )
    load_weights(run.model, content["model"], str(path))
    try:
        run.optimizer.load_state_dict(content["optimizer"])
    except ValueError as error:
        raise InputError(f"{path} was trained with another optimiser setting ({error})") from error
    run.scaler.load_state_dict(content["scaler"])
    run.epoch, run.best = content["epoch"], content["best"]
    run.logger.say(f"resumed {path} after epoch {run.epoch}")


def save(run: Run, name: str) -> None:
    """Write a checkpoint into the run folder; the other processes wait for it."""
    if distributed.is_main():
        save_checkpoint(run.folder / name, run.content())
    distributed.barrier()


def class_difference(first: Sequence[str], second: Sequence[str]) -> str:
    """The first names that only one of two class lists has."""
    odd = sorted(set(first) ^ set(second))
    return ", ".join(odd[:5]) if odd else "the same names under other ids"
