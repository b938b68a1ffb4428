"""How a recipe becomes optimizer steps: counts, learning rates, and the lines that announce a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import yaml

from solov2.config import Config, TrainConfig
from solov2.errors import InputError
from solov2.training.optim import learning_rate_factor, scaled_learning_rate


@dataclass(frozen=True)
class Plan:
    """A recipe on a number of processes."""

    train: TrainConfig
    processes: int
    steps_per_epoch: int  # 0 where the data set is not known

    @classmethod
    def of(cls, train: TrainConfig, *, images: int | None, batches: int | None, processes: int) -> Plan:
        """The plan for a data set.

        Args:
            train: the recipe.
            images: of the training set; only for the error.
            batches: per epoch and process; None where the data set is not known.
            processes: that train together.

        Raises:
            InputError: the data set is too small for one step.
        """
        steps_per_epoch = (batches or 0) // train.accumulate
        if batches is not None and steps_per_epoch == 0:
            raise InputError(
                f"{images} training images make {batches} batches, fewer than the "
                f"{train.accumulate} that one optimizer step accumulates; lower the batch size"
            )
        return cls(train, processes, steps_per_epoch)

    @property
    def global_batch(self) -> int:
        """Images per optimizer step, of all processes."""
        return self.train.batch_size * self.processes * self.train.accumulate

    @property
    def learning_rate(self) -> float:
        """The recipe's rate, scaled to the global batch."""
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


def announcement(config: Config, plan: Plan, *, parameters: int, images: int | None, device: torch.device) -> list[str]:
    """The first two lines of a run; what is None is called unknown."""
    train, processes = config.train, plan.processes
    steps = plan.steps_per_epoch or "an unknown number of"
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
