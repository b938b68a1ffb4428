"""The epochs of a run: training, averaging, saving, evaluating, and stopping when told to."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from solov2 import distributed
from solov2.build import build_criterion
from solov2.compute import Compute
from solov2.data.build import validation_loader
from solov2.data.coco import CocoInstances
from solov2.data.loader import TrainBatchSampler
from solov2.data.watch import watched
from solov2.errors import InputError, RunFailed
from solov2.evaluation.coco import CocoEvaluator, format_table
from solov2.evaluation.loop import evaluate
from solov2.evaluation.picture import draw_predictions
from solov2.losses import SOLOv2Criterion
from solov2.predict import Predictor
from solov2.training.guard import NonFiniteGuard, first_nonfinite, stuck_mask_loss
from solov2.training.logger import Meter
from solov2.training.plan import Plan
from solov2.training.run import Run, wrap
from solov2.training.signals import Stopped, StopSignal
from solov2.training.step import grouped, repeat_forward, take_step, unwrap


@dataclass(frozen=True)
class StepDone:
    """An optimizer step that was taken."""

    of_epoch: int  # steps done of the epoch
    of_run: int  # steps done of the run
    figures: dict[str, float] | None = None  # every `log_every` steps: mean losses, images_per_second, learning_rate
    seconds_left: float = 0.0  # of the run, known with the figures


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
    """One pass over the loader, or what is left of it; the caller acts after each step.

    Between batch and optimizer step nothing waits for the device; losses are read every `plan.train.log_every` steps.

    Args:
        model: SOLOv2, possibly in DistributedDataParallel, on its device.
        criterion: (raw, targets, num_positives) -> dict of losses.
        loader: batches with targets (DESIGN: pixels, sizes, targets), the first of them of step `first_step`.
        optimizer: its learning rate is set before each step.
        scaler: of `Compute.scaler`.
        compute: device, precision and layout.
        plan: steps, learning rates, accumulation and clipping.
        guard: watches whether the steps are finite.
        epoch: 0-based; its first global step is epoch * plan.steps_per_epoch.
        first_step: steps of this epoch that are already done.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and the guard does not skip such steps.
    """
    model.train()
    meter = Meter(plan.processes)
    for i, batches in enumerate(grouped(loader, plan.train.accumulate), first_step):
        step = epoch * plan.steps_per_epoch + i
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        losses, wrong = take_step(model, criterion, batches, optimizer, scaler, compute, clip_norm=plan.train.clip_norm)
        guard.watch(step, wrong, batches)
        meter.add(losses, images=sum(len(batch["image_ids"]) for batch in batches))
        reads = (step + 1) % plan.train.log_every == 0 or i == plan.steps_per_epoch - 1
        failure = guard.failure(now=reads)
        if failure is not None:
            repeat = functools.partial(repeat_forward, model, criterion, failure[1], compute)
            raise guard.explain(*failure, first_nonfinite(unwrap(model), repeat))
        if not reads:
            yield StepDone(i + 1, step + 1)
            continue
        figures, step_seconds = meter.read()  # the only read of the device in the loop, with the guard's
        figures["learning_rate"] = optimizer.param_groups[0]["lr"]
        yield StepDone(i + 1, step + 1, figures, (plan.total_steps - step - 1) * step_seconds)


def train_epochs(
    run: Run, loader: DataLoader, sampler: TrainBatchSampler, validation: CocoInstances | None
) -> dict[str, Any] | None:
    """All steps and evaluations that are left; returns the summary of the last evaluation."""
    train = run.config.train
    criterion = build_criterion(run.config.model, mask_weight=train.mask_weight)
    model = wrap(run.model, run.compute.device)
    guard = NonFiniteGuard(run.folder, skip=train.nonfinite == "skip", file_name=run.dataset.file_name)
    summary = None
    with StopSignal(train.stall_seconds, run.folder) as stop, stop.report_unresponsive_ranks():
        while True:
            fresh = run.evaluated < run.epoch or run.epoch == train.epochs
            if validation is not None and fresh and _is_due(run, train.evaluate_every):
                summary = _evaluate(run, validation, stop)
            if run.epoch == train.epochs:
                return summary
            sampler.set_epoch(run.epoch, first_batch=run.step * train.accumulate)
            run.logger.start_epoch(run.epoch + 1, run.plan.steps_per_epoch, done=run.step)
            steps = train_one_epoch(
                model,
                criterion,
                _saving_where_they_fail(run, watched(loader, run.dataset)),
                run.optimizer,
                run.scaler,
                run.compute,
                run.plan,
                guard,
                epoch=run.epoch,
                first_step=run.step,
            )
            for done in steps:
                _after_step(run, done, stop, guard)
            run.logger.end_epoch()
            run.epoch, run.step = run.epoch + 1, 0
            distributed.broadcast_buffers(run.model)
            if run.average is not None:  # it follows the running statistics of this process's own images
                distributed.broadcast_buffers(run.average.module)
            # Always before an evaluation, which may be told to stop.
            evaluates = validation is not None and _is_due(run, train.evaluate_every)
            if _is_due(run, train.checkpoint_every) or evaluates or _is_save_step(run):
                run.save()


def _after_step(run: Run, done: StepDone, stop: StopSignal, guard: NonFiniteGuard) -> None:
    """Log, average the weights, save where it is time, and end the run where it was told to."""
    run.logger.advance()
    if done.figures is not None:
        run.logger.train(
            done.of_run,
            epoch=run.epoch + 1,
            total_steps=run.plan.total_steps,
            seconds_left=done.seconds_left,
            skipped=guard.skipped,
            **done.figures,
        )
        _warn_if_stuck(run, done.of_run, done.figures["loss_mask"])
    run.step = done.of_epoch
    if run.average is not None:
        run.average.update(run.model)
    signal_number = stop.poll()
    if signal_number or (_is_save_step(run) and run.step < run.plan.steps_per_epoch):
        run.save()
    if signal_number:
        raise Stopped(signal_number, run.folder)


def _warn_if_stuck(run: Run, step: int, loss_mask: float) -> None:
    """Once, when the warm-up lies as far back as it was long."""
    if run.mask_loss_checked or step < 2 * run.config.train.warmup_steps:
        return
    run.mask_loss_checked = True
    warning = stuck_mask_loss(loss_mask, run.config.train.mask_weight)
    if warning is not None:
        run.logger.warn(warning, step)


def _is_due(run: Run, every: int) -> bool:
    """Whether something that happens every so many epochs, and after the last, happens now."""
    return run.epoch == run.config.train.epochs or (run.epoch > 0 and run.epoch % every == 0)


def _is_save_step(run: Run) -> bool:
    every = run.config.train.checkpoint_steps
    return every > 0 and run.global_step % every == 0


def _saving_where_they_fail(run: Run, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches; an image that cannot be read or a loader that is gone costs none of the steps done.

    Of several processes one cannot save by itself: the others wait for it in the middle of the next step.
    """
    try:
        yield from batches
    except (InputError, OSError, RunFailed):
        if distributed.world_size() == 1 and run.global_step:
            run.save()
            run.logger.say(f"saved step {run.global_step} before the run fails; go on with --resume")
        raise


def _evaluate(run: Run, validation: CocoInstances, stop: StopSignal) -> dict[str, Any]:
    loader = validation_loader(run.config, validation, device=run.compute.device)
    summary = evaluate(
        Predictor(run.evaluated_model, run.compute),
        stop.until_signaled(watched(loader, validation)),  # the checkpoint before it is already written
        CocoEvaluator(validation.coco, validation.category_ids),
        overlap=run.compute.device.type != "cpu",
        progress=len(loader) if distributed.is_main() else None,
    )
    run.evaluated = run.epoch
    run.logger.write("evaluation", run.epoch, **flat_figures(summary))
    run.logger.say(f"epoch {run.epoch}: mask AP {summary['segm']['AP']:.3f}, box AP {summary['bbox']['AP']:.3f}")
    if summary["segm"]["AP"] > run.best:
        run.best = summary["segm"]["AP"]
        run.save_best()
    return summary


def flat_figures(summary: dict[str, Any]) -> dict[str, float]:
    """{"segm_AP": ..., "bbox_AP50": ...} of an evaluator's summary."""
    return {f"{kind}_{name}": value for kind in ("segm", "bbox") for name, value in summary[kind].items()}


def show_summary(run: Run, validation: CocoInstances, summary: dict[str, Any]) -> None:
    """The table of the last evaluation and a picture."""
    train, path = run.config.train, run.folder / "predictions.png"
    run.logger.say(format_table(summary))
    if distributed.is_main():
        picture = draw_predictions(
            run.evaluated_model, validation, count=train.picture_images, score_threshold=train.picture_score
        )
        picture.save(path)
    run.logger.say(
        f"mask AP {summary['segm']['AP']:.3f}, AP50 {summary['segm']['AP50']:.3f}; "
        f"predictions beside ground truth in {path}"
    )
