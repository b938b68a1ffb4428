"""Going on with a checkpoint: a run put back to where it was written, to the bit."""

from __future__ import annotations

from pathlib import Path

import torch

from solov2 import distributed
from solov2.checkpoint import Checkpoint, TrainingState
from solov2.config import Config, changed_settings
from solov2.data.categories import class_difference
from solov2.errors import InputError
from solov2.training.folder import check_agreement, remove_leftovers, step_checkpoints, step_file
from solov2.training.randomness import set_random_state
from solov2.training.run import Run
from solov2.weights import load_weights


def resume(run: Run, checkpoint: Checkpoint) -> None:
    """Put a run back to where a checkpoint was written; it is then the newest of the run folder.

    Settings that differ from the checkpoint's are used from here on and logged.

    Raises:
        InputError: not a checkpoint of a run, or of another model, other classes, another optimizer or later than the
            run's end; or the processes do not see the same file.
    """
    state, source = check_resumable(run.config, checkpoint), checkpoint.source
    names = checkpoint.class_names or []
    if names != run.model.class_names:
        raise InputError(f"{source} was trained on other classes: {class_difference(names, run.model.class_names)}")
    check_agreement(state.position, source)
    load_weights(run.model, state.weights, source)
    _restore_optimizer(run, state, source)
    _restore_average(run, checkpoint, state)
    run.epoch, run.step, run.evaluated = state.epoch, state.step, state.evaluated
    if Path(source).parent.resolve() == run.folder.resolve():  # the best of another folder stays there
        run.best = state.best
    if run.step and state.global_batch != run.plan.global_batch:
        run.logger.say(
            f"warning: {source} was written with {state.global_batch} images per step; the epoch goes on at about the "
            "same image"
        )
        same_image = run.step * state.global_batch // run.plan.global_batch
        run.step = min(same_image, run.plan.steps_per_epoch - 1)
    if len(state.random_states) == distributed.world_size():
        set_random_state(state.random_states[distributed.rank()], run.compute.device)
    _log_resume(run, checkpoint, state)
    _make_newest(run)


def check_resumable(config: Config, checkpoint: Checkpoint) -> TrainingState:
    """The training state of a checkpoint that a configuration can go on with; needs neither data nor a device.

    Raises:
        InputError: not a checkpoint of a run, of another optimizer, or later than the run's end.
    """
    source, train, state = checkpoint.source, config.train, checkpoint.training
    if state is None:
        raise InputError(f"{source} is no checkpoint of a training run; start from its weights with --weights")
    optimizer = (checkpoint.config or {}).get("train", {}).get("optimizer", train.optimizer)
    if optimizer != train.optimizer:
        raise InputError(
            f"{source} was trained with {optimizer}, whose state {train.optimizer} cannot take over; resume with "
            f"--optimizer {optimizer}, or start from its weights with --weights"
        )
    if state.position > (train.epochs, 0):
        raise InputError(
            f"{source} is in epoch {state.epoch + 1}, past the end of a run of {train.epochs}; resume with more "
            "--epochs"
        )
    return state


def _restore_optimizer(run: Run, state: TrainingState, source: str) -> None:
    settings = [{key: group[key] for key in group if key != "params"} for group in run.optimizer.param_groups]
    try:
        run.optimizer.load_state_dict(state.optimizer)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source} was trained with another optimizer setting ({error})") from error
    for group, wanted in zip(run.optimizer.param_groups, settings, strict=True):
        group.update(wanted)
    match_layout(run.optimizer)
    if state.scaler and run.scaler.is_enabled():  # empty where the run had another precision
        run.scaler.load_state_dict(state.scaler)


def _restore_average(run: Run, checkpoint: Checkpoint, state: TrainingState) -> None:
    if run.average is None:
        return
    # The averaged weights, or those in training where the run did not average.
    load_weights(run.average.module, checkpoint.weights, checkpoint.source)
    run.average.updates = state.updates or 0


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay the loaded moments out as their parameters, as fused steps need it; the memory format may have changed."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _log_resume(run: Run, checkpoint: Checkpoint, state: TrainingState) -> None:
    source = checkpoint.source
    changed = changed_settings(checkpoint.config or {}, run.config.to_dict())
    run.logger.write("resume", run.global_step, file=source, changed=changed)
    position = f" and {run.step} of {run.plan.steps_per_epoch} steps" if run.step else ""
    run.logger.say(f"resumed {source} after epoch {run.epoch}{position}")
    if changed:
        run.logger.say(f"warning: changed since that checkpoint: {', '.join(changed)}")
    if state.annotations_sha256 != run.annotations_sha256:
        run.logger.say(f"warning: {run.dataset.annotation_file} is not the file that checkpoint was trained with")


def _make_newest(run: Run) -> None:
    """Set checkpoints of later steps than the resumed one aside, and save it where the folder does not have it.

    The newest is known by its step: what was trained after the resumed step must not pass for this run's.
    """
    there = True
    if distributed.is_main():
        remove_leftovers(run.folder)
        for path in step_checkpoints(run.folder):
            if path.name > step_file(run.global_step):
                path.rename(path.with_name(f"{path.name}.aside"))
                run.logger.say(f"warning: {path} is of a later step and is now called {path.name}.aside")
        there = (run.folder / step_file(run.global_step)).is_file()
    if not distributed.broadcast_object(there):
        run.save()
