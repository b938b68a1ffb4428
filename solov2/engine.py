"""Training and evaluation loops: two functions, everything they need is an argument."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from solov2 import distributed
from solov2.logger import Meter, RunLogger

HALF_TYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision of the device's type: "float32" (off), "bf16" or "fp16"."""
    half = HALF_TYPES[precision]
    return torch.autocast(device.type, dtype=half, enabled=half is not None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of a batch and of its targets on the device; everything else as it is."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return {key: move(item) for key, item in value.items()} if isinstance(value, dict) else value

    return move(batch)


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    *,
    learning_rate: float,
    device: torch.device,
    epoch: int,
    steps_per_epoch: int,
    total_steps: int,
    logger: RunLogger,
    precision: str = "float32",
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    memory_format: torch.memory_format = torch.contiguous_format,
    log_every: int = 50,
) -> None:
    """One pass over the loader.

    Each optimiser step takes `accumulate` batches; their losses are normalised by the positive cells of all of them, so
    that accumulation equals the large batch. Between batch and optimiser step nothing waits for the device; losses are
    read every `log_every` steps.

    Args:
        model: SOLOv2, possibly in DistributedDataParallel.
        criterion: (raw, targets, num_positives) -> dict of losses.
        loader: batches with targets (DESIGN: pixels, sizes, targets).
        optimizer: its learning rate is set to learning_rate * schedule(step) before each step.
        schedule: factor as a function of the global step.
        epoch: 0-based; the first global step is epoch * steps_per_epoch.
        clip_norm: L2 norm the gradients are clipped to, 0 for none.

    Raises:
        FloatingPointError: a loss is not finite; the sentence names the step.
    """
    model.train()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    meter = Meter(distributed.world_size())
    logger.start_epoch(epoch + 1, steps_per_epoch)
    for i, batches in enumerate(grouped(loader, accumulate)):
        step = epoch * steps_per_epoch + i
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step)
        losses = backward(
            model, criterion, batches, scaler, device=device, precision=precision, memory_format=memory_format
        )
        if clip_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(unwrap(model).parameters(), clip_norm, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        meter.add(losses, images=sum(len(batch["image_ids"]) for batch in batches))
        logger.advance()
        if (step + 1) % log_every == 0 or i == steps_per_epoch - 1:
            values, step_seconds = meter.read()  # the only read of the device in the loop
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"the loss is not finite in the steps up to {step + 1} of epoch {epoch + 1} ({values}); lower the "
                    "learning rate, or use bf16 instead of fp16"
                )
            values |= {"learning_rate": optimizer.param_groups[0]["lr"]}
            left = (total_steps - step - 1) * step_seconds
            logger.train(step + 1, epoch=epoch + 1, total_steps=total_steps, seconds_left=left, **values)
    logger.end_epoch()


def backward(
    model: nn.Module,
    criterion: nn.Module,
    batches: list[dict[str, Any]],
    scaler: torch.amp.GradScaler,
    *,
    device: torch.device,
    precision: str,
    memory_format: torch.memory_format,
) -> dict[str, Tensor]:
    """Forward and backward of the batches of one optimiser step; gradients add up in the parameters.

    Processes exchange gradients once, in the last batch.

    Returns:
        The losses of the step, detached, on the device.
    """
    bare = unwrap(model)
    num_positives = count_positives(batches, criterion.num_classes) if len(batches) > 1 else None
    total: dict[str, Tensor] = {}
    for j, batch in enumerate(batches):
        batch = to_device(batch, device)
        images = bare.normalize(batch["pixels"], batch["sizes"]).contiguous(memory_format=memory_format)
        exchange = bare is model or j == len(batches) - 1
        with contextlib.nullcontext() if exchange else model.no_sync():
            with autocast(device, precision):
                raw = model(images)
            losses = criterion(raw, batch["targets"], num_positives)
            scaler.scale(sum(losses.values())).backward()
        total = {name: loss.detach() + total.get(name, 0) for name, loss in losses.items()}
    return total


def grouped(batches: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Lists of `size` batches; a shorter rest is dropped, since a step of fewer images would weigh them more."""
    group: list[dict[str, Any]] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def count_positives(batches: list[dict[str, Any]], num_classes: int) -> int:
    """Positive cells of host-side batches, at least 1."""
    return max(1, sum(int((batch["targets"]["category"] < num_classes).sum()) for batch in batches))


def predictor(
    model: nn.Module,
    *,
    device: torch.device,
    precision: str = "float32",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """batch -> one result per image with run-length masks, by a model that is put into evaluation mode."""
    model.eval()

    def predict(batch: dict[str, Any]) -> list[dict[str, Any]]:
        batch = to_device(batch, device)
        images = model.normalize(batch["pixels"], batch["sizes"]).contiguous(memory_format=memory_format)
        with autocast(device, precision):
            raw = model(images)
        return model.postprocess(raw, batch["sizes"], batch["original_sizes"], mask_format="rle")

    return predict


@torch.no_grad()
def evaluate(
    predict: Callable[[dict[str, Any]], list[dict[str, Any]]],
    loader: Iterable[dict[str, Any]],
    evaluator: Any,
    *,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Predict every batch, collect the predictions of all processes, and compute the figures.

    Args:
        predict: batch -> results, one per image; `predictor` makes one of a model.
        loader: batches of this process's share of the images.
        evaluator: with update(image_ids, results), predictions, merge(shares), summarize(**options).
        progress: show a bar on a terminal.
        options: of `evaluator.summarize`, e.g. per_class.

    Returns:
        The evaluator's summary of all images, the same on every process; the main process's evaluator holds all
        predictions.
    """
    for batch in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=None if progress else True):
        evaluator.update(batch["image_ids"], predict(batch))
    shares = distributed.all_gather_objects(evaluator.predictions)
    summary = None
    if distributed.is_main():
        evaluator.merge(shares)
        summary = evaluator.summarize(**options)
    return distributed.broadcast_object(summary)
