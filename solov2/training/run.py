"""The state of a training run, and its checkpoints."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from solov2 import distributed
from solov2.checkpoint import Checkpoint, TrainingState
from solov2.compute import Compute
from solov2.config import Config
from solov2.data.image_dataset import ImageDataset
from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.training.folder import save_step
from solov2.training.logger import RunLogger
from solov2.training.optim import WeightAverage
from solov2.training.plan import Plan
from solov2.training.randomness import random_state
from solov2.weights import weight_metadata


@dataclass
class Run:
    """The objects of a training run and its progress."""

    config: Config
    folder: Path
    compute: Compute
    plan: Plan
    model: SOLOv2
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    dataset: ImageDataset
    annotations_sha256: str  # of the training set
    conditions: dict[str, str]  # see `environment.conditions`
    logger: RunLogger
    epoch: int = 0  # completed epochs
    step: int = 0  # completed optimizer steps of the next epoch
    evaluated: int = 0  # completed epochs at the last evaluation
    best: float = -1.0  # mask AP or PQ of the best evaluation so far, -1 before the first
    stale: int = 0  # evaluations since the best one
    mask_loss_checked: bool = False  # whether the check after the warm-up is done

    @property
    def global_step(self) -> int:
        """Completed optimizer steps of the whole run."""
        return self.epoch * self.plan.steps_per_epoch + self.step

    @property
    def evaluated_model(self) -> SOLOv2:
        """The averaged model if the run keeps one, or else the one being trained."""
        return self.model if self.average is None else self.average.module

    def save(self) -> None:
        """Write a checkpoint of the current step; all ranks call this together."""
        checkpoint = self._checkpoint()
        if distributed.is_main():
            with _explain_write_errors(self.folder):
                save_step(self.folder, self.global_step, checkpoint, keep=self.config.train.keep_checkpoints)
        distributed.barrier()

    def save_best(self) -> None:
        """Write `best.pth`; all ranks call this together."""
        checkpoint = self._checkpoint()
        if distributed.is_main():
            with _explain_write_errors(self.folder):
                checkpoint.save(self.folder / "best.pth")
        distributed.barrier()

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            source=str(self.folder),
            weights=self.evaluated_model.state_dict(),
            traits=weight_metadata(self.config.model),
            class_names=self.model.class_names,
            category_ids=self.dataset.category_ids,
            stuff_names=self.model.stuff_names or None,
            stuff_category_ids=self.dataset.stuff_category_ids or None,
            config=self.config.to_dict(),
            training=TrainingState(
                weights=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                epoch=self.epoch,
                step=self.step,
                evaluated=self.evaluated,
                best=self.best,
                stale=self.stale,
                global_batch=self.plan.global_batch,
                annotations_sha256=self.annotations_sha256,
                conditions=self.conditions,
                random_states=distributed.gather_objects(random_state(self.compute.device)),
                updates=None if self.average is None else self.average.updates,
            ),
        )


@contextlib.contextmanager
def _explain_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write a checkpoint to {folder} ({error.strerror or error}); existing ones are intact, "
            "continue with --resume"
        ) from error


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several processes."""
    if distributed.world_size() == 1:
        return model
    # Buffers are broadcast once per epoch instead of in every step; torch 2.14 renamed the flag.
    flags = inspect.signature(DistributedDataParallel).parameters
    sync: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in flags else "broadcast_buffers": False}
    # After its first step, DDP rebuilds its gradient buckets. Three or more ranks then add gradients in another order,
    # so the first step after a resume would round differently. find_unused_parameters keeps the buckets, at the cost of
    # a graph traversal per step and a warning from torch that there are no unused parameters.
    repeatable = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type != "cpu" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=repeatable and distributed.world_size() > 2,
        **sync,
    )
