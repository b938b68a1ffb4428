"""A training run: what belongs together, its steps, its folder, its checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from solov2 import distributed
from solov2.build import load_weights, traits_of
from solov2.checkpoint import (
    is_own,
    load_file,
    remove_leftovers,
    save_checkpoint,
    save_step,
    step_checkpoints,
    step_file,
)
from solov2.commands.folder import check_agreement
from solov2.config import Config, InputError, TrainConfig, changed_settings
from solov2.data.coco import CocoInstances
from solov2.errors import RunFailed
from solov2.logger import RunLogger
from solov2.models.solov2 import SOLOv2
from solov2.optim import WeightAverage, make_schedule, scaled_learning_rate
from solov2.outputs import replace_file


@dataclass(frozen=True)
class Plan:
    """How a recipe becomes optimiser steps on a number of processes."""

    processes: int
    global_batch: int  # images per optimiser step, of all processes
    learning_rate: float  # scaled to the global batch
    steps_per_epoch: int | None  # None where the data set is not known


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
    plan: Plan
    average: WeightAverage | None = None
    epoch: int = 0  # epochs done
    step: int = 0  # optimiser steps done of the epoch after them
    evaluated: int = 0  # epochs done at the last evaluation
    best: float = -1.0  # mask AP of the best evaluation so far
    said_stuck: bool = False  # whether the mask loss after the warm-up was looked at
    annotations_sha256: str = ""  # of the training set

    @property
    def global_step(self) -> int:
        """Optimiser steps done of the whole run."""
        return self.epoch * self.plan.steps_per_epoch + self.step

    @property
    def evaluated_model(self) -> SOLOv2:
        """The averaged weights where there are some, else those in training."""
        return self.model if self.average is None else self.average.module

    def content(self) -> dict[str, Any]:
        """Everything a checkpoint holds; all processes call it together."""
        averaged = {}
        if self.average is not None:
            averaged = {"averaged": self.average.module.state_dict(), "updates": self.average.updates}
        return averaged | {
            "model": self.model.state_dict(),
            "config": self.config.to_dict(),
            "traits": traits_of(self.config.model),
            "class_names": self.model.class_names,
            "category_ids": self.dataset.category_ids,
            "annotations_sha256": self.annotations_sha256,
            "epoch": self.epoch,
            "step": self.step,
            "global_batch": self.plan.global_batch,
            "evaluated": self.evaluated,
            "best": self.best,
            "random_states": distributed.all_gather_objects(random_state(self.device)),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


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


def write_config(run: Run) -> None:
    """Write the resolved configuration into the run folder."""
    if distributed.is_main():
        with replace_file(run.folder / "config.yaml") as file:
            file.write(config_text(run.config).encode())


def resume(run: Run, path: Path) -> None:
    """Put a run back to where a checkpoint was written; it is then the newest of the run folder.

    Settings that differ from the checkpoint's hold from here on, and are said.

    Raises:
        InputError: not a checkpoint of a run, or of another model, other classes, another optimiser or later than the
            run's end; or the processes do not see the same file.
    """
    content = load_file(path)
    if not is_own(content) or "optimizer" not in content:
        raise InputError(f"{path} is no checkpoint of a training run; start from its weights with --weights")
    _check_resumable(run, path, content)
    load_weights(run.model, content["model"], str(path))
    settings = [{key: group[key] for key in group if key != "params"} for group in run.optimizer.param_groups]
    try:
        run.optimizer.load_state_dict(content["optimizer"])
    except ValueError as error:
        raise InputError(f"{path} was trained with another optimiser setting ({error})") from error
    for group, wanted in zip(run.optimizer.param_groups, settings, strict=True):
        group.update(wanted)
    match_layout(run.optimizer)
    if content["scaler"]:  # empty where the run had another precision
        run.scaler.load_state_dict(content["scaler"])
    run.epoch, run.step = content["epoch"], content.get("step", 0)
    run.evaluated = content.get("evaluated", run.epoch)
    if path.parent.resolve() == run.folder.resolve():  # the best of another folder stays there
        run.best = content["best"]
    if run.average is not None and "averaged" in content:
        run.average.module.load_state_dict(content["averaged"])
        run.average.updates = content["updates"]
    elif run.average is not None:
        run.average.module.load_state_dict(run.model.state_dict())
    global_batch = content.get("global_batch", run.plan.global_batch)
    if run.step and global_batch != run.plan.global_batch:
        run.logger.say(
            f"warning: {path} was written with {global_batch} images per step; the epoch goes on at about the same "
            "image"
        )
        run.step = min(run.step * global_batch // run.plan.global_batch, run.plan.steps_per_epoch - 1)
    states = content.get("random_states", [])
    if len(states) == distributed.world_size():
        set_random_state(states[distributed.rank()], run.device)
    position = f" and {run.step} of {run.plan.steps_per_epoch} steps" if run.step else ""
    changed = changed_settings(content["config"], run.config.to_dict())
    run.logger.write("resume", run.global_step, file=str(path), changed=changed)
    run.logger.say(f"resumed {path} after epoch {run.epoch}{position}")
    if changed:
        run.logger.say(f"warning: changed since that checkpoint: {', '.join(changed)}")
    if content.get("annotations_sha256", run.annotations_sha256) != run.annotations_sha256:
        run.logger.say(f"warning: {run.dataset.annotation_file} is not the file that checkpoint was trained with")
    _make_newest(run)


def _check_resumable(run: Run, path: Path, content: dict[str, Any]) -> None:
    if content["class_names"] != run.model.class_names:
        raise InputError(
            f"{path} was trained on other classes: {class_difference(content['class_names'], run.model.class_names)}"
        )
    train = run.config.train
    optimizer = content["config"]["train"].get("optimizer", train.optimizer)
    if optimizer != train.optimizer:
        raise InputError(
            f"{path} was trained with {optimizer}, whose state {train.optimizer} cannot take over; resume with "
            f"--optimizer {optimizer}, or start from its weights with --weights"
        )
    if (content["epoch"], content.get("step", 0)) > (train.epochs, 0):
        raise InputError(
            f"{path} is in epoch {content['epoch'] + 1}, past the end of a run of {train.epochs}; resume with more "
            "--epochs"
        )
    check_agreement((content["epoch"], content.get("step", 0)), path)


def _make_newest(run: Run) -> None:
    """Set aside checkpoints of later steps than the resumed one, and save it where the folder does not have it.

    The newest is known by its step: what was trained after the resumed step must not pass for this run's.
    """
    there = True
    if distributed.is_main():
        remove_leftovers(run.folder)
        for path in step_checkpoints(run.folder):
            if path.name > step_file(run.global_step):
                path.rename(path.with_name(f"{path.name}.aside"))
                run.logger.say(f"warning: {path} is of a later step and is now called {path.name}.aside")
        there = (run.folder / step_file(run.global_step)).is_file()
    if not distributed.broadcast_object(there):
        save(run)


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay the loaded moments out as their parameters, as fused steps need it; the memory format may have changed."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Within it, an operation that may give other bits the next time is an error (RuntimeError, told as a sentence)."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = False, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise RunFailed(f"--deterministic cannot be kept here: {str(error).partition('.')[0]}") from error
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, by which a log tells data sets apart."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of this process's generators, on the host and on its device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)


def save(run: Run) -> None:
    """Write a checkpoint of the present step; the other processes wait for it."""
    content = run.content()
    if distributed.is_main():
        with _naming_the_checkpoint(run.folder):
            save_step(run.folder, run.global_step, content, keep=run.config.train.keep_checkpoints)
    distributed.barrier()


def save_best(run: Run) -> None:
    """Write `best.pth`; the other processes wait for it."""
    content = run.content()
    if distributed.is_main():
        with _naming_the_checkpoint(run.folder):
            save_checkpoint(run.folder / "best.pth", content)
    distributed.barrier()


@contextlib.contextmanager
def _naming_the_checkpoint(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"no checkpoint could be written to {folder} ({error.strerror or error}); those it holds are whole, "
            "go on with --resume"
        ) from error


def class_difference(first: Sequence[str], second: Sequence[str]) -> str:
    """The first names that only one of two class lists has."""
    odd = sorted(set(first) ^ set(second))
    return ", ".join(odd[:5]) if odd else "the same names under other ids"
