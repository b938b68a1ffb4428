"""A training run: what belongs together, its steps, its folder, its checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from solov2 import distributed
from solov2.build import load_weights, traits_of
from solov2.checkpoint import is_own, latest_checkpoint, load_file, save_checkpoint
from solov2.config import Config, InputError, TrainConfig
from solov2.data.coco import CocoInstances
from solov2.logger import RunLogger
from solov2.models.solov2 import SOLOv2
from solov2.optim import make_schedule, scaled_learning_rate


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


@dataclass(frozen=True)
class Plan:
    """How a recipe becomes optimiser steps on a number of processes."""

    processes: int
    global_batch: int  # images per optimiser step, of all processes
    learning_rate: float  # scaled to the global batch
    steps_per_epoch: int | None  # None where the data set is not known


def plan_run(train: TrainConfig, *, images: int | None, batches: int | None, processes: int) -> Plan:
    """The steps of a recipe.

    Args:
        train: the recipe.
        images: of the training set; only for the error.
        batches: per epoch and process; None where the data set is not known.
        processes: that train together.

    Raises:
        InputError: the data set is too small for one step.
    """
    steps_per_epoch = None if batches is None else batches // train.accumulate
    if steps_per_epoch == 0:
        raise InputError(
            f"{images} training images make {batches} batches, fewer than the "
            f"{train.accumulate} that one optimiser step accumulates; lower the batch size"
        )
    global_batch = train.batch_size * processes * train.accumulate
    rate = scaled_learning_rate(train.learning_rate, global_batch, train.reference_batch_size)
    return Plan(processes, global_batch, rate, steps_per_epoch)


def run_schedule(train: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning-rate factor of each optimiser step (0-based) of a recipe."""
    return make_schedule(
        train.schedule,
        steps_per_epoch=steps_per_epoch,
        epochs=train.epochs,
        warmup_steps=train.warmup_steps,
        warmup_start=train.warmup_start,
        step_epochs=train.step_epochs,
    )


def announcement(config: Config, plan: Plan, *, parameters: int, images: int | None, device: torch.device) -> list[str]:
    """What a run says at its start, in two lines; what is None is called unknown."""
    train, processes = config.train, plan.processes
    steps = "an unknown number of" if plan.steps_per_epoch is None else plan.steps_per_epoch
    return [
        f"{config.name}: {parameters:,} parameters, {'an unknown number of' if images is None else images} training "
        f"images, {processes} process{'es' if processes > 1 else ''} on {device.type}, {train.precision}",
        f"{train.epochs} epochs of {steps} steps, {plan.global_batch} images per step ({train.batch_size} per "
        f"process x {processes} x {train.accumulate} accumulated); learning rate {train.learning_rate:g} for "
        f"{train.reference_batch_size} images, scaled to {plan.learning_rate:g}",
    ]


def config_text(config: Config) -> str:
    """The configuration as YAML, as the run folder has it."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False)


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
            (folder / "config.yaml").write_text(config_text(config))
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
