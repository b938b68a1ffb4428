"""The training loop: epochs of optimizer steps, weight averaging, checkpoints, evaluation, and stopping on a signal."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from solov2 import distributed
from solov2.build import build_criterion
from solov2.compute import Compute
from solov2.data.image_dataset import ImageDataset
from solov2.data.loader import TrainBatchSampler
from solov2.data.watch import watched
from solov2.errors import SAVE_TRAINING_MEMORY, OutOfMemory, RunFailed, count
from solov2.evaluation.summary import headline
from solov2.losses import SOLOv2Criterion
from solov2.training.guard import NonFiniteGuard, first_nonfinite, stuck_mask_loss
from solov2.training.logger import Meter
from solov2.training.plan import Plan
from solov2.training.run import Run, wrap
from solov2.training.signals import RANK_FAILED, Stopped, StopSignal
from solov2.training.step import grouped, repeat_forward, take_step, unwrap
from solov2.training.validation import evaluate_run


@dataclass(frozen=True)
class StepDone:
    """A completed optimizer step."""

    epoch_step: int  # completed steps of the epoch
    global_step: int  # completed steps of the run
    figures: dict[str, float] | None = None  # every `log_every` steps: mean losses, images_per_second, learning_rate
    seconds_left: float = 0.0  # until the end of the run; set together with the figures


def train_one_epoch(
    model: nn.Module,
    criterion: SOLOv2Criterion,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    compute: Compute,
    plan: Plan,
    guard: NonFiniteGuard,
    *,
    epoch: int,
    first_step: int = 0,
) -> Iterator[StepDone]:
    """Train for one epoch, or for the rest of it; yields after each step.

    Nothing between batch and optimizer step waits for the device; losses are read every `plan.train.log_every` steps.

    Args:
        model: SOLOv2, possibly in DistributedDataParallel, on its device.
        criterion: (raw, targets, num_positives, num_labeled) -> dict of losses.
        loader: batches (dict with "pixels", "sizes", "image_ids", "targets"), starting with those of `first_step`.
        optimizer: its learning rate is set before each step.
        scaler: from `Compute.scaler`.
        compute: device, precision and memory format.
        plan: steps, learning rates, accumulation and clipping.
        guard: detects non-finite steps.
        epoch: 0-based; its first global step is epoch * plan.steps_per_epoch.
        first_step: number of completed steps of this epoch.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and the guard does not skip such steps.
    """
    model.train()
    meter = Meter(plan.processes)
    for i, batches in enumerate(grouped(loader, plan.train.accumulate), first_step):
        step = epoch * plan.steps_per_epoch + i
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step) * group.get("rate_factor", 1.0)
        losses, status = take_step(
            model, criterion, batches, optimizer, scaler, compute, clip_norm=plan.train.clip_norm
        )
        guard.watch(step, status, batches)
        meter.add(losses, images=sum(len(batch["image_ids"]) for batch in batches))
        read_now = (step + 1) % plan.train.log_every == 0 or i == plan.steps_per_epoch - 1
        failure = guard.failure(now=read_now)
        if failure is not None:
            repeat = functools.partial(repeat_forward, model, criterion, failure[1], compute)
            raise guard.explain(*failure, first_nonfinite(unwrap(model), repeat))
        if not read_now:
            yield StepDone(i + 1, step + 1)
            continue
        figures, step_seconds = meter.read()  # apart from the guard, the only place that waits for the device
        figures["learning_rate"] = optimizer.param_groups[0]["lr"]
        yield StepDone(i + 1, step + 1, figures, (plan.total_steps - step - 1) * step_seconds)


def train_epochs(
    run: Run,
    loader: DataLoader,
    sampler: TrainBatchSampler,
    validation: ImageDataset | None,
    *,
    deadline: float = math.inf,
) -> dict[str, Any] | None:
    """Run all remaining steps and evaluations; returns the summary of the last evaluation, None if there was none.

    Args:
        run: where the run stands.
        loader, sampler: of the training set.
        validation: None if the run does not evaluate.
        deadline: no step starts after this time of `time.monotonic`.

    Raises:
        Stopped: a signal arrived, the deadline passed, or a callback requested it.
    """
    train = run.config.train
    semantic_weight = train.semantic_auxiliary or train.semantic_weight
    criterion = build_criterion(run.config.model, mask_weight=train.mask_weight, semantic_weight=semantic_weight)
    model = wrap(run.model, run.compute.device)
    guard = NonFiniteGuard(run.folder, skip=train.nonfinite == "skip", file_name=run.dataset.file_name)
    summary: dict[str, Any] | None = None
    means: dict[str, float | None] = {}  # of the last trained epoch
    callbacks = run.logger.callbacks
    with (
        StopSignal(train.stall_seconds, run.folder, deadline=deadline, callbacks=callbacks) as stop,
        stop.report_unresponsive_ranks(),
    ):
        while True:
            unevaluated = run.evaluated < run.epoch or run.epoch == train.epochs
            evaluation = ""
            if validation is not None and unevaluated and _is_due(run, train.evaluate_every):
                summary = evaluate_run(run, validation, stop)
                evaluation = headline(summary)
            run.logger.show_epoch(run.epoch, train.epochs, means, evaluation)
            if run.epoch == train.epochs or (evaluation and _stops_early(run)):
                return summary
            sampler.set_epoch(run.epoch, first_batch=run.step * train.accumulate)
            run.logger.start_epoch(run.epoch + 1, run.plan.steps_per_epoch, done=run.step)
            steps = train_one_epoch(
                model,
                criterion,
                _ready_on_all_ranks(run, loader, stop),
                run.optimizer,
                run.scaler,
                run.compute,
                run.plan,
                guard,
                epoch=run.epoch,
                first_step=run.step,
            )
            try:
                for done in steps:
                    _after_step(run, done, guard)
            except OutOfMemory as error:
                raise _memory_failure(run, error) from error
            run.epoch, run.step = run.epoch + 1, 0
            means = run.logger.end_epoch(run.epoch, images_per_step=run.plan.global_batch)
            distributed.broadcast_buffers(run.model)
            if run.average is not None:  # its running statistics differ between ranks, too
                distributed.broadcast_buffers(run.average.module)
            # A signal may stop the evaluation, so always save before it.
            evaluates_next = validation is not None and _is_due(run, train.evaluate_every)
            if _is_due(run, train.checkpoint_every) or evaluates_next or _is_save_step(run):
                run.save()


def _memory_failure(run: Run, error: OutOfMemory) -> RunFailed:
    """Save if this process trains alone (others are still inside the step), and say what to do."""
    advice = f"in step {run.global_step + 1}: {SAVE_TRAINING_MEMORY}"
    if distributed.world_size() == 1 and run.global_step:
        run.save()
        advice += f"; saved step {run.global_step}, continue with --resume"
    return RunFailed(f"{error} {advice}")


def _after_step(run: Run, done: StepDone, guard: NonFiniteGuard) -> None:
    """Log, update the weight average, and save if it is due."""
    run.logger.advance()
    if done.figures is not None:
        run.logger.train(
            done.global_step,
            epoch=run.epoch + 1,
            total_steps=run.plan.total_steps,
            seconds_left=done.seconds_left,
            skipped=guard.skipped,
            **done.figures,
        )
        _warn_if_stuck(run, done.global_step, done.figures["loss_mask"])
    run.step = done.epoch_step
    if run.average is not None:
        run.average.update(run.model)
    if _is_save_step(run) and run.step < run.plan.steps_per_epoch:
        run.save()


def _warn_if_stuck(run: Run, step: int, loss_mask: float) -> None:
    """Warn once, after twice the length of the warm-up, if the mask loss has not fallen."""
    if run.mask_loss_checked or step < 2 * run.config.train.warmup_steps:
        return
    run.mask_loss_checked = True
    warning = stuck_mask_loss(loss_mask, run.config.train.mask_weight)
    if warning is not None:
        run.logger.warn(warning, step)


def _is_due(run: Run, every: int) -> bool:
    """Whether something that happens every `every` epochs, and after the last one, is due now."""
    return run.epoch == run.config.train.epochs or (run.epoch > 0 and run.epoch % every == 0)


def _stops_early(run: Run) -> bool:
    """Whether the evaluation that was just done is one too many without a better figure, and say so."""
    if not 0 < run.config.train.early_stopping <= run.stale:
        return False
    run.logger.print(f"{count(run.stale, 'evaluation')} without a better one: the run ends (train.early_stopping)")
    return True


def _is_save_step(run: Run) -> bool:
    every = run.config.train.checkpoint_steps
    return every > 0 and run.global_step % every == 0


def _ready_on_all_ranks(run: Run, loader: DataLoader, stop: StopSignal) -> Iterator[dict[str, Any]]:
    """Yield the batches; no rank starts a step before every rank has its batch.

    So all of them are after the same step if one receives a signal or has no batch, because an image cannot be read or
    a worker has died. They save that step together and end the run.

    Raises:
        Stopped: a rank received a signal, its deadline passed, or a callback requested it.
        InputError, OSError, RunFailed: this rank has no batch.
        RunFailed: another rank has none; the message says which and why.
    """
    batches = watched(loader, run.dataset, stall_seconds=run.config.train.stall_seconds, check=stop.check)
    while True:
        batch, failure = None, None
        try:
            batch = next(batches, None)
        except Stopped:
            pass  # the other ranks must learn of it
        except Exception as error:
            failure = error
        status = stop.poll(failed=failure is not None)
        if status == RANK_FAILED:
            if run.global_step:
                run.save()
                run.logger.print(f"saved step {run.global_step} before the run fails; continue with --resume")
            texts = distributed.all_gather_objects(None if failure is None else str(failure))
            raise failure or RunFailed(
                "; ".join(f"rank {rank} failed: {text}" for rank, text in enumerate(texts) if text is not None)
            )
        if status:
            run.save()
            raise Stopped(status, run.folder)
        if batch is None:
            return
        yield batch
