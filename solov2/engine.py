"""Training and evaluation loops: two functions, everything they need is an argument."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from solov2 import distributed
from solov2.guard import FAILED, OVERFLOWED, NonFiniteGuard, first_nonfinite
from solov2.logger import Meter, RunLogger

Predictor = Callable[[dict[str, Any]], Callable[[], list[dict[str, Any]]]]

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
    guard: NonFiniteGuard,
    first_step: int = 0,
    after_step: Callable[[int], None] = lambda _done: None,
    after_reading: Callable[[int, dict[str, float]], None] = lambda _step, _values: None,
    precision: str = "float32",
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    memory_format: torch.memory_format = torch.contiguous_format,
    log_every: int = 50,
) -> None:
    """One pass over the loader, or what is left of it.

    Each optimiser step takes `accumulate` batches; their losses are normalised by the positive cells of all of them, so
    that accumulation equals the large batch. Between batch and optimiser step nothing waits for the device; losses are
    read every `log_every` steps.

    Args:
        model: SOLOv2, possibly in DistributedDataParallel.
        criterion: (raw, targets, num_positives) -> dict of losses.
        loader: batches with targets (DESIGN: pixels, sizes, targets), the first of them of step `first_step`.
        optimizer: its learning rate is set to learning_rate * schedule(step) before each step.
        schedule: factor as a function of the global step.
        epoch: 0-based; its first global step is epoch * steps_per_epoch.
        guard: sees whether the steps are finite.
        first_step: steps of this epoch that are already done.
        after_step: called with the number of the epoch's steps that are done; may raise to end the run.
        after_reading: called with the global number of steps done and the figures that were read.
        clip_norm: L2 norm the gradients are clipped to, 0 for none.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and the guard does not skip such steps.
    """
    model.train()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    options = {"device": device, "precision": precision, "memory_format": memory_format}
    meter = Meter(distributed.world_size())
    logger.start_epoch(epoch + 1, steps_per_epoch, done=first_step)
    for i, batches in enumerate(grouped(loader, accumulate), first_step):
        step = epoch * steps_per_epoch + i
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step)
        losses, wrong = take_step(model, criterion, batches, optimizer, scaler, clip_norm=clip_norm, **options)
        guard.watch(step, wrong, batches)
        meter.add(losses, images=sum(len(batch["image_ids"]) for batch in batches))
        logger.advance()
        read = (step + 1) % log_every == 0 or i == steps_per_epoch - 1
        failure = guard.failure(now=read)
        if failure is not None:
            repeat = functools.partial(repeat_forward, model, criterion, failure[1], **options)
            raise guard.explain(*failure, first_nonfinite(unwrap(model), repeat))
        if read:
            values, step_seconds = meter.read()  # the only read of the device in the loop, with the guard's
            values |= {"learning_rate": optimizer.param_groups[0]["lr"]}
            left = (total_steps - step - 1) * step_seconds
            logger.train(
                step + 1, epoch=epoch + 1, total_steps=total_steps, seconds_left=left, skipped=guard.skipped, **values
            )
            after_reading(step + 1, values)
        after_step(i + 1)
    logger.end_epoch()


def take_step(
    model: nn.Module,
    criterion: nn.Module,
    batches: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    clip_norm: float,
    **options: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step; where it is not finite, neither weights nor running statistics change.

    Returns:
        (losses, what is wrong with the step in any process: 0, OVERFLOWED or FAILED), both on the device. A gradient
        that overflows under fp16 is no failure yet, the scaler answers it with a smaller scale.
    """
    statistics = [
        buffer
        for module in unwrap(model).modules()
        if isinstance(module, nn.BatchNorm2d) and module.training
        for buffer in (module.running_mean, module.running_var)
    ]
    before = [buffer.clone() for buffer in statistics]
    losses = backward(model, criterion, batches, scaler, **options)
    finite = torch.stack(list(losses.values())).isfinite().all()
    for buffer, old in zip(statistics, before, strict=True):
        buffer.copy_(torch.where(finite, buffer, old))
    norm = update_weights(optimizer, scaler, clip_norm=clip_norm)
    overflow = norm.isfinite().logical_not() * (OVERFLOWED if scaler.is_enabled() else FAILED)
    return losses, distributed.largest(torch.where(finite, overflow, FAILED))


def update_weights(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *, clip_norm: float) -> Tensor:
    """Clip, step, and drop the gradients; a norm that is not finite leaves the weights as they are, on the device.

    The norm is that of the exchanged gradients, so all processes decide alike. Returns it.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)
    decides = getattr(optimizer, "_step_supports_amp_scaling", False) and not scaler.is_enabled()
    if decides:  # a fused optimiser leaves out the step by what torch's own scaler would tell it
        optimizer.found_inf = (~norm.isfinite()).float()
    elif not scaler.is_enabled():
        for parameter in parameters:
            parameter.grad = torch.where(norm.isfinite(), parameter.grad, 0)
    scaler.step(optimizer)
    scaler.update()
    if decides:
        del optimizer.found_inf
    optimizer.zero_grad(set_to_none=True)
    return norm


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
    num_positives = count_positives(batches, criterion.num_classes) if len(batches) > 1 else None
    total: dict[str, Tensor] = {}
    for j, batch in enumerate(batches):
        exchange = unwrap(model) is model or j == len(batches) - 1
        with contextlib.nullcontext() if exchange else model.no_sync():
            losses = forward(
                model,
                criterion,
                batch,
                num_positives,
                device=device,
                precision=precision,
                memory_format=memory_format,
            )
            scaler.scale(sum(losses.values())).backward()
        total = {name: loss.detach() + total.get(name, 0) for name, loss in losses.items()}
    return total


def forward(
    model: nn.Module,
    criterion: nn.Module,
    batch: dict[str, Any],
    num_positives: int | None,
    *,
    device: torch.device,
    precision: str,
    memory_format: torch.memory_format,
) -> dict[str, Tensor]:
    """Losses of a batch that is still on the host."""
    batch = to_device(batch, device)
    images = unwrap(model).normalize(batch["pixels"], batch["sizes"]).contiguous(memory_format=memory_format)
    with autocast(device, precision):
        raw = model(images)
    return criterion(raw, batch["targets"], num_positives)


def repeat_forward(
    model: nn.Module, criterion: nn.Module, batches: list[dict[str, Any]], **options: Any
) -> dict[str, Tensor]:
    """Losses of the batches of one step by "batch i name", without an exchange between processes."""
    num_positives = count_positives(batches, criterion.num_classes) if len(batches) > 1 else None
    return {
        f"{name} of batch {j + 1}": loss
        for j, batch in enumerate(batches)
        for name, loss in forward(unwrap(model), criterion, batch, num_positives, **options).items()
    }


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
) -> Predictor:
    """batch -> what makes one result per image, with run-length masks, by a model that is put into evaluation mode.

    The network is run (on an accelerator: queued) by the first call, everything after it by the second.
    """
    model.eval()

    def predict(batch: dict[str, Any]) -> Callable[[], list[dict[str, Any]]]:
        batch = to_device(batch, device)
        images = model.normalize(batch["pixels"], batch["sizes"]).contiguous(memory_format=memory_format)
        with autocast(device, precision):
            raw = model(images)
        return partial(model.postprocess, raw, batch["sizes"], batch["original_sizes"], mask_format="rle")

    return predict


@torch.no_grad()
def evaluate(
    predict: Predictor,
    loader: Iterable[dict[str, Any]],
    evaluator: Any,
    *,
    overlap: bool = False,
    progress: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predict every batch, collect the predictions of all processes, and compute the figures.

    Args:
        predict: batch -> function without arguments -> results, one per image; `predictor` makes one of a model.
        loader: batches of this process's share of the images.
        evaluator: with update(image_ids, results), predictions, merge(shares), summarize(**options).
        overlap: make the results of one batch, run lengths included, in a thread while the network computes the next;
            two batches are then in memory. For accelerators: on a CPU both would want the same cores.
        progress: batches of the loader, to show a bar on a terminal; None shows none.
        options: of `evaluator.summarize`, e.g. per_class.

    Returns:
        The evaluator's summary of all images, the same on every process; the main process's evaluator holds all
        predictions.
    """

    @torch.no_grad()  # gradient mode belongs to a thread
    def collect(image_ids: list[int], finish: Callable[[], list[dict[str, Any]]]) -> None:
        evaluator.update(image_ids, finish())

    bar = {"desc": "evaluating", "unit": "batch", "leave": False}
    batches = tqdm(loader, total=progress, **bar, disable=True if progress is None else None)
    with ThreadPoolExecutor(max_workers=1) as background:
        pending: Future | None = None
        for batch in batches:
            finish = predict(batch)
            if not overlap:
                collect(batch["image_ids"], finish)
                continue
            if pending is not None:
                pending.result()
            pending = background.submit(collect, batch["image_ids"], finish)
        if pending is not None:
            pending.result()
    shares = distributed.all_gather_objects(evaluator.predictions)
    summary = None
    if distributed.is_main():
        evaluator.merge(shares)
        summary = evaluator.summarize(**options)
    return distributed.broadcast_object(summary)
