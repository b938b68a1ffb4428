"""Optimizer steps and learning rates of a run, and the lines that announce it."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from solov2.compute import Compute
from solov2.config import Config, TrainConfig
from solov2.errors import InputError, count
from solov2.training.optim import learning_rate_factor, scaled_learning_rate


@dataclass(frozen=True)
class Plan:
    """A training recipe, applied to a dataset and a number of processes."""

    train: TrainConfig
    processes: int
    steps_per_epoch: int  # 0 if the dataset is unknown

    @classmethod
    def of(cls, train: TrainConfig, *, images: int | None, batches: int | None, processes: int) -> Plan:
        """Build the plan for a dataset.

        Args:
            train: the recipe.
            images: number of training images, for the error message; None if the dataset is unknown.
            batches: per epoch and process; None if the dataset is unknown.
            processes: number of processes that train together.

        Raises:
            InputError: the dataset is too small for one step.
        """
        steps_per_epoch = (batches or 0) // train.accumulate
        if batches is not None and steps_per_epoch == 0:
            raise InputError(
                f"{count(batches, 'batch', 'batches')} per process from {count(images or 0, 'training image')}, "
                f"fewer than the {train.accumulate} that one optimizer step needs; "
                "lower the batch size or train.accumulate"
            )
        return cls(train, processes, steps_per_epoch)

    @property
    def global_batch(self) -> int:
        """Images per optimizer step, over all processes."""
        return self.train.batch_size * self.processes * self.train.accumulate

    @property
    def learning_rate(self) -> float:
        """The learning rate of the recipe, scaled to the global batch."""
        return scaled_learning_rate(self.train.learning_rate, self.global_batch, self.train.reference_batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.train.epochs

    def rate(self, step: int) -> float:
        """Learning rate of an optimizer step (0-based)."""
        factor = learning_rate_factor(
            step,
            self.train.schedule,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.train.epochs,
            warmup_steps=self.train.warmup_steps,
            warmup_start=self.train.warmup_start,
            step_epochs=self.train.step_epochs,
        )
        return self.learning_rate * factor


def announcement(config: Config, plan: Plan, *, parameters: int, images: int | None, compute: Compute) -> list[str]:
    """The first lines of a run; `images` is None and the steps per epoch are 0 if the dataset is unknown."""
    train, processes = config.train, plan.processes
    steps = count(plan.steps_per_epoch, "step") if plan.steps_per_epoch else "an unknown number of steps"
    known_images = "an unknown number of training images" if images is None else count(images, "training image")
    auxiliary = (
        f"auxiliary semantic loss of weight {train.semantic_auxiliary:g}; its head starts from random weights unless "
        "the run is resumed, and trained models are without it"
    )
    return [
        f"{config.name}: {parameters:,} parameters, {known_images}, {count(processes, 'process', 'processes')} on "
        f"{compute.device.type}, {compute.precision}",
        f"{count(train.epochs, 'epoch')} of {steps}, {count(plan.global_batch, 'image')} per step ({train.batch_size} "
        f"per process x {processes} x {train.accumulate} accumulated); learning rate {train.learning_rate:g} for "
        f"{count(train.reference_batch_size, 'image')}, scaled to {plan.learning_rate:g}",
        *([auxiliary] if train.semantic_auxiliary else []),
    ]


def hopeless_settings(config: Config, plan: Plan, *, weights: bool) -> list[str]:
    """Warnings about settings with which a run hardly learns; empty for every published recipe.

    Args:
        config: of the run.
        plan: the same recipe, applied to a dataset; without one, the warm-up is not judged.
        weights: whether the run starts from the weights of a file, its backbone included.
    """
    messages = []
    if config.train.pretrained_backbone == "none" and not weights:
        cure = "or start from trained weights with train.pretrained_backbone or --weights"
        stages, norms = config.model.frozen_stages, config.model.frozen_batch_norm
        if stages:
            messages.append(
                f"model.frozen_stages is {stages} but the backbone is random: its frozen layers never learn; set "
                f"model.frozen_stages to 0, {cure}"
            )
        if norms:
            messages.append(
                "model.frozen_batch_norm is true but the backbone is random: its batch norms keep their initial "
                f"statistics, which normalize nothing; set model.frozen_batch_norm to false, {cure}"
            )
    if 0 < plan.total_steps < 2 * config.train.warmup_steps:
        messages.append(
            f"the warm-up of {count(config.train.warmup_steps, 'step')} (train.warmup_steps) is longer than half of "
            f"the {count(plan.total_steps, 'optimizer step')} of the run; lower train.warmup_steps to about "
            f"{plan.total_steps // 10}, or raise train.epochs"
        )
    return messages


def config_text(config: Config) -> str:
    """The configuration as YAML, as it is saved in the run folder."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False)
