"""The epochs of a run: training, averaging, saving, evaluating, and ending where it was told to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from solov2 import distributed
from solov2.build import build_criterion, choose_memory_format
from solov2.commands.data import validation_loader, watched
from solov2.commands.picture import draw_predictions
from solov2.commands.run import Run, run_schedule, save, save_best
from solov2.commands.stop import Stopped, StopSignal
from solov2.config import InputError
from solov2.data.coco import CocoInstances
from solov2.data.loader import TrainBatchSampler
from solov2.engine import evaluate, predictor, train_one_epoch
from solov2.errors import RunFailed
from solov2.evaluation.coco import CocoEvaluator, format_table
from solov2.guard import NonFiniteGuard, stuck_mask_loss


def train_epochs(
    run: Run, loader: DataLoader, sampler: TrainBatchSampler, validation: CocoInstances | None
) -> dict[str, Any] | None:
    """All steps and evaluations that are left; returns the summary of the last evaluation."""
    config, train, plan = run.config, run.config.train, run.plan
    schedule = run_schedule(train, plan.steps_per_epoch)
    criterion = build_criterion(config.model, mask_weight=train.mask_weight)
    model = wrap(run.model, run.device)
    guard = NonFiniteGuard(run.folder, skip=train.nonfinite == "skip", file_name=run.dataset.file_name)
    summary = None
    with StopSignal(train.stall_seconds) as stop, stop.naming_the_silent():
        while True:
            fresh = run.evaluated < run.epoch or run.epoch == train.epochs
            if validation is not None and fresh and _is_due(run, train.evaluate_every):
                summary = _evaluate(run, validation, stop)
            if run.epoch == train.epochs:
                return summary
            sampler.set_epoch(run.epoch, first_batch=run.step * train.accumulate)
            train_one_epoch(
                model,
                criterion,
                _saving_where_they_fail(run, watched(loader, run.dataset)),
                run.optimizer,
                schedule,
                learning_rate=plan.learning_rate,
                device=run.device,
                epoch=run.epoch,
                steps_per_epoch=plan.steps_per_epoch,
                total_steps=plan.steps_per_epoch * train.epochs,
                logger=run.logger,
                guard=guard,
                first_step=run.step,
                after_step=functools.partial(_after_step, run, stop),
                after_reading=functools.partial(_say_if_stuck, run),
                precision=train.precision,
                scaler=run.scaler,
                accumulate=train.accumulate,
                clip_norm=train.clip_norm,
                memory_format=choose_memory_format(config, run.device),
                log_every=train.log_every,
            )
            run.epoch, run.step = run.epoch + 1, 0
            distributed.broadcast_buffers(run.model)
            if run.average is not None:  # it follows the running statistics of this process's own images
                distributed.broadcast_buffers(run.average.module)
            # Always before an evaluation, which may be told to stop.
            evaluates = validation is not None and _is_due(run, train.evaluate_every)
            if _is_due(run, train.checkpoint_every) or evaluates or _is_save_step(run):
                save(run)


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
            save(run)
            run.logger.say(f"saved step {run.global_step} before the run fails; go on with --resume")
        raise


def _after_step(run: Run, stop: StopSignal, done: int) -> None:
    """Average the weights, save where it is time, and end the run where it was told to."""
    run.step = done
    if run.average is not None:
        run.average.update(run.model)
    signal_number = stop.poll()
    if signal_number or (_is_save_step(run) and done < run.plan.steps_per_epoch):
        save(run)
    if signal_number:
        raise Stopped(signal_number)


def _say_if_stuck(run: Run, step: int, losses: dict[str, float]) -> None:
    """Once, when the warm-up lies as far back as it was long."""
    if run.said_stuck or step < 2 * run.config.train.warmup_steps:
        return
    run.said_stuck = True
    sentence = stuck_mask_loss(losses["loss_mask"], run.config.train.mask_weight)
    if sentence is not None:
        run.logger.write("warning", step, text=sentence)
        run.logger.say(f"warning: {sentence}")


def _evaluate(run: Run, validation: CocoInstances, stop: StopSignal) -> dict[str, Any]:
    evaluator = CocoEvaluator(validation.coco, validation.category_ids)
    predict = predictor(
        run.evaluated_model,
        device=run.device,
        precision=run.config.train.precision,
        memory_format=choose_memory_format(run.config, run.device),
    )
    loader = validation_loader(run.config, validation, device=run.device)
    summary = evaluate(
        predict,
        stop.ending(watched(loader, validation)),  # the checkpoint before it is already written
        evaluator,
        overlap=run.device.type != "cpu",
        progress=len(loader) if distributed.is_main() else None,
    )
    figures = {f"{kind}_{name}": value for kind in ("segm", "bbox") for name, value in summary[kind].items()}
    run.evaluated = run.epoch
    run.logger.write("evaluation", run.epoch, **figures)
    run.logger.say(f"epoch {run.epoch}: mask AP {summary['segm']['AP']:.3f}, box AP {summary['bbox']['AP']:.3f}")
    if summary["segm"]["AP"] > run.best:
        run.best = summary["segm"]["AP"]
        save_best(run)
    return summary


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


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around the model where there are several processes."""
    if distributed.world_size() == 1:
        return model
    # Buffers are broadcast once per epoch instead of in every step; the flag for it got a new name in torch 2.14.
    flags = inspect.signature(DistributedDataParallel).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in flags else "broadcast_buffers"
    # After its first step DDP sorts the gradients into other buckets, in which three processes and more add them up in
    # another order; the first step after a resume would then round otherwise. Looking for unused parameters keeps the
    # buckets, for a walk over the graph per step and a warning of torch that there are none.
    repeatable = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type != "cpu" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=repeatable and distributed.world_size() > 2,
        **{flag: False},
    )
