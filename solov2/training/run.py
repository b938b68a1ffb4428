"""A training run: what belongs together while it goes on, and its checkpoints."""

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
from solov2.data.coco import CocoInstances
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
    """What belongs together while a run goes on, and where it is."""

    config: Config
    folder: Path
    compute: Compute
    plan: Plan
    model: SOLOv2
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    dataset: CocoInstances
    annotations_sha256: str  # of the training set
    logger: RunLogger
    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done of the epoch after them
    evaluated: int = 0  # epochs done at the last evaluation
    best: float = -1.0  # mask AP of the best evaluation so far
    mask_loss_checked: bool = False  # whether the mask loss after the warm-up was looked at

    @property
    def global_step(self) -> int:
        """Optimizer steps done of the whole run."""
        return self.epoch * self.plan.steps_per_epoch + self.step

    @property
    def evaluated_model(self) -> SOLOv2:
        """The averaged weights where there are some, else those in training."""
        return self.model if self.average is None else self.average.module

    def save(self) -> None:
        """Write a checkpoint of the present step; all processes call it together."""
        checkpoint = self._checkpoint()
        if distributed.is_main():
            with _naming_the_folder(self.folder):
                save_step(self.folder, self.global_step, checkpoint, keep=self.config.train.keep_checkpoints)
        distributed.barrier()

    def save_best(self) -> None:
        """Write `best.pth`; all processes call it together."""
        checkpoint = self._checkpoint()
        if distributed.is_main():
            with _naming_the_folder(self.folder):
                checkpoint.save(self.folder / "best.pth")
        distributed.barrier()

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            source=str(self.folder),
            weights=self.evaluated_model.state_dict(),
            traits=weight_metadata(self.config.model),
            class_names=self.model.class_names,
            category_ids=self.dataset.category_ids,
            config=self.config.to_dict(),
            training=TrainingState(
                weights=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                epoch=self.epoch,
                step=self.step,
                evaluated=self.evaluated,
                best=self.best,
                global_batch=self.plan.global_batch,
                annotations_sha256=self.annotations_sha256,
                random_states=distributed.all_gather_objects(random_state(self.compute.device)),
                updates=None if self.average is None else self.average.updates,
            ),
        )


@contextlib.contextmanager
def _naming_the_folder(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"no checkpoint could be written to {folder} ({error.strerror or error}); those it holds are whole, "
            "go on with --resume"
        ) from error


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around the model where there are several processes."""
    if distributed.world_size() == 1:
        return model
    # Buffers are broadcast once per epoch instead of in every step; the flag for it got a new name in torch 2.14.
    flags = inspect.signature(DistributedDataParallel).parameters
    sync: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in flags else "broadcast_buffers": False}
    # After its first step DDP sorts the gradients into other buckets, in which three processes and more add them up in
    # another order; the first step after a resume would then round otherwise. Looking for unused parameters keeps the
    # buckets, for a walk over the graph per step and a warning of torch that there are none.
    repeatable = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type != "cpu" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=repeatable and distributed.world_size() > 2,
        **sync,
    )
