"""One optimizer step: forward, losses, backward, update. Nothing in it waits for the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from solov2 import distributed
from solov2.compute import Compute, span
from solov2.errors import OutOfMemory, memory_shortage
from solov2.losses import SOLOv2Criterion
from solov2.ops.panoptic import IGNORED
from solov2.training.guard import FAILED, OVERFLOWED

Counts: TypeAlias = tuple[int | None, int | None]  # num_positives and num_labeled of `SOLOv2Criterion.forward`


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself if it is not wrapped."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def take_step(
    model: nn.Module,
    criterion: SOLOv2Criterion,
    batches: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    compute: Compute,
    *,
    clip_norm: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step; if it is not finite, neither weights nor running statistics change.

    Args:
        model: SOLOv2, possibly in DistributedDataParallel, on its device.
        criterion: (raw, targets, num_positives, num_labeled) -> dict of losses.
        batches: on the host, with targets; their gradients are accumulated.
        optimizer: over the model's parameters, with fused=True.
        scaler: from `Compute.scaler`.
        compute: device, precision and memory format.
        clip_norm: maximum L2 norm of the gradients; 0 disables clipping.

    Returns:
        (losses, status), both on the device; the status is 0, OVERFLOWED or FAILED, the maximum over all ranks. An
        overflowing fp16 gradient is not yet a failure: the scaler reduces its scale.

    Raises:
        OutOfMemory: in the forward or backward pass; nothing has changed.
    """
    statistics = [
        buffer
        for module in unwrap(model).modules()
        if isinstance(module, nn.BatchNorm2d) and module.training
        for buffer in module.buffers()
    ]
    before = [buffer.clone() for buffer in statistics]
    try:
        with compute.arithmetic():
            losses = backward(model, criterion, batches, scaler, compute)
    except (MemoryError, RuntimeError) as error:
        shortage = memory_shortage(error)
        if shortage is None:
            raise
        optimizer.zero_grad(set_to_none=True)
        for buffer, old in zip(statistics, before, strict=True):
            buffer.copy_(old)
        raise OutOfMemory(shortage) from error
    with span("update"):
        finite = torch.stack(list(losses.values())).isfinite().all()
        norm = update_weights(optimizer, scaler, clip_norm=clip_norm)
        for buffer, old in zip(statistics, before, strict=True):
            buffer.copy_(torch.where(finite & norm.isfinite(), buffer, old))
    overflow = norm.isfinite().logical_not() * (OVERFLOWED if scaler.is_enabled() else FAILED)
    return losses, distributed.all_reduce_max(torch.where(finite, overflow, FAILED))


def backward(
    model: nn.Module,
    criterion: SOLOv2Criterion,
    batches: list[dict[str, Any]],
    scaler: torch.amp.GradScaler,
    compute: Compute,
) -> dict[str, Tensor]:
    """Forward and backward passes of one optimizer step; gradients are accumulated over its batches.

    The losses are normalized by the positive cells and labeled pixels of all batches, so that accumulation equals one
    large batch. Ranks exchange gradients once, in the last batch.

    Returns:
        The losses of the step, detached, on the device.
    """
    counts = count_targets(batches, criterion.num_classes)
    total: dict[str, Tensor] = {}
    for j, batch in enumerate(batches):
        last = j == len(batches) - 1
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
            losses = forward(model, criterion, batch, counts, compute)
            with span("backward"):
                scaler.scale(functools.reduce(torch.add, losses.values())).backward()
        total = {name: loss.detach() + total.get(name, 0) for name, loss in losses.items()}
    return total


def forward(
    model: nn.Module, criterion: SOLOv2Criterion, batch: dict[str, Any], counts: Counts, compute: Compute
) -> dict[str, Tensor]:
    """Losses of a batch on the host, normalized by `counts`."""
    batch = compute.move(batch)
    images = compute.images(unwrap(model), batch)  # float32 [B, 3, H, W]
    with compute.autocast():
        raw = model(images)
    with span("loss"):
        return criterion(raw, batch["targets"], *counts)


def repeat_forward(
    model: nn.Module, criterion: SOLOv2Criterion, batches: list[dict[str, Any]], compute: Compute
) -> dict[str, Tensor]:
    """Losses of the batches of one step as {"NAME of batch J": loss}, without communication between ranks."""
    counts = count_targets(batches, criterion.num_classes)
    with compute.arithmetic():
        return {
            f"{name} of batch {j + 1}": loss
            for j, batch in enumerate(batches)
            for name, loss in forward(unwrap(model), criterion, batch, counts, compute).items()
        }


def update_weights(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, *, clip_norm: float) -> Tensor:
    """Clip, step, and discard the gradients; if their norm is not finite, the device leaves the weights unchanged.

    Returns the norm. It is that of the exchanged gradients, so all ranks make the same decision.

    Raises:
        ValueError: the optimizer is not fused; it would not skip such a step.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(f"{type(optimizer).__name__} must be constructed with fused=True")
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)
    if not scaler.is_enabled():  # set the flag by which torch's scaler tells a fused optimizer to skip the step
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    scaler.step(optimizer)
    scaler.update()
    if not scaler.is_enabled():
        del optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.zero_grad(set_to_none=True)
    return norm


def grouped(batches: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Lists of `size` batches; an incomplete last one is dropped, since its images would have more weight."""
    group: list[dict[str, Any]] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def count_targets(batches: list[dict[str, Any]], num_classes: int) -> Counts:
    """What the losses of batches on the host are normalized by; (None, None), each its own, if there is only one."""
    return (count_positives(batches, num_classes), count_labeled(batches)) if len(batches) > 1 else (None, None)


def count_labeled(batches: list[dict[str, Any]]) -> int | None:
    """Number of pixels of batches on the host that are not void, at least 1; None without semantic maps."""
    maps = [batch["targets"]["semantic"] for batch in batches if "semantic" in batch["targets"]]
    return max(1, sum(int((labels != IGNORED).sum()) for labels in maps)) if maps else None


def count_positives(batches: list[dict[str, Any]], num_classes: int) -> int:
    """Number of positive cells of batches on the host, at least 1."""
    return max(1, sum(int((batch["targets"]["category"] < num_classes).sum()) for batch in batches))
