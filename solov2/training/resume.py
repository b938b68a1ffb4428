"""Resume a run from a checkpoint; it continues bit-identically."""

from __future__ import annotations

from pathlib import Path

import torch

from solov2 import distributed
from solov2.checkpoint import Checkpoint, TrainingState
from solov2.config import Config, changed_settings
from solov2.data.class_matching import difference, shorten
from solov2.errors import InputError, count
from solov2.training.folder import check_ranks_agree, remove_partial_files, step_checkpoints, step_file
from solov2.training.optim import check_optimizer_state
from solov2.training.randomness import set_random_state
from solov2.training.run import Run
from solov2.weights import auxiliary_tensors, load_weights


def resume(run: Run, checkpoint: Checkpoint) -> None:
    """Restore a run from a checkpoint, which becomes the newest of the run folder.

    Settings that differ from the checkpoint's apply from here on and are logged.

    Raises:
        InputError: the checkpoint is not from a training run, has another model, other classes or another optimizer, or
            lies past the end of the run; or the processes do not see the same file.
    """
    state, source = check_resumable(run.config, checkpoint), checkpoint.source
    for kind, trained, now in (
        ("classes", checkpoint.class_names, run.model.class_names),
        ("stuff", checkpoint.stuff_names, run.model.stuff_names),
    ):
        if (trained or []) != now:
            raise InputError(
                f"{source} was trained on other {kind} than those of {run.dataset.annotation_file}: "
                f"{_class_changes(trained or [], now)}; resume with its own annotation file, or start from its weights "
                "with --weights, which are matched by name"
            )
    check_ranks_agree(state.position, source)
    load_weights(run.model, state.weights, source)
    _restore_optimizer(run, state, source)
    _restore_average(run, checkpoint, state)
    run.epoch, run.step, run.evaluated = state.epoch, state.step, state.evaluated
    if Path(source).parent.resolve() == run.folder.resolve():  # best.pth of another folder is not copied
        run.best, run.stale = state.best, state.stale
    if state.global_batch != run.plan.global_batch:
        where = "; the epoch continues at about the same image" if run.step else ""
        run.logger.warn(
            f"{source} was written with {state.global_batch} images per step, now {run.plan.global_batch}{where}"
        )
    same_image = run.step * state.global_batch // run.plan.global_batch
    run.step = min(same_image, run.plan.steps_per_epoch - 1)
    if len(state.random_states) == distributed.world_size():
        set_random_state(state.random_states[distributed.rank()], run.compute.device)
    _log_resume(run, checkpoint, state)
    _make_newest(run, source)


def check_resumable(config: Config, checkpoint: Checkpoint) -> TrainingState:
    """Check that a run with this configuration can resume from the checkpoint, and return its training state.

    Raises:
        InputError: the checkpoint is not from a training run, has another optimizer or other losses, or lies past the
            end of the run.
    """
    source, train, state = checkpoint.source, config.train, checkpoint.training
    if state is None:
        raise InputError(f"{source} is not a checkpoint of a training run; start from its weights with --weights")
    optimizer = (checkpoint.config or {}).get("train", {}).get("optimizer", train.optimizer)
    if optimizer != train.optimizer:
        raise InputError(
            f"{source} was trained with {optimizer}, and {train.optimizer} cannot use its state; resume with "
            f"--optimizer {optimizer}, or start from its weights with --weights"
        )
    if bool(auxiliary_tensors(state.weights)) != bool(train.semantic_auxiliary):
        trained, now = ("without", "one") if train.semantic_auxiliary else ("with", "none")
        raise InputError(
            f"{source} was trained {trained} an auxiliary semantic loss, and train.semantic_auxiliary "
            f"{train.semantic_auxiliary:g} asks for {now}; resume with the setting it was trained with, or start from "
            "its weights with --weights"
        )
    if state.position > (train.epochs, 0):
        steps = f" and {count(state.step, 'step')}" if state.step else ""
        raise InputError(
            f"{source} was written after {count(state.epoch, 'epoch')}{steps}, past the end of a run of "
            f"{count(train.epochs, 'epoch')}; increase --epochs"
        )
    return state


def _class_changes(before: list[str], now: list[str]) -> str:
    """How a list of classes has changed, as text for a message."""
    gone, new = difference(before, now), difference(now, before)
    parts = [f"without {shorten(gone)}"] if gone else []
    parts += [f"with {shorten(new)}"] if new else []
    return f"now {' and '.join(parts)}" if parts else "now in another order"


def _restore_optimizer(run: Run, state: TrainingState, source: str) -> None:
    # The learning rate of the last step stays: the next step sets its own, and until then checkpoints contain it.
    settings = [
        {key: group[key] for key in group if key not in ("params", "lr")} for group in run.optimizer.param_groups
    ]
    try:
        check_optimizer_state(run.optimizer, state.optimizer)
        run.optimizer.load_state_dict(state.optimizer)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"the optimizer state of {source} does not fit this run ({error})") from error
    for group, wanted in zip(run.optimizer.param_groups, settings, strict=True):
        group.update(wanted)
    match_memory_format(run.optimizer)
    if state.scaler and run.scaler.is_enabled():  # empty unless the run trained in fp16
        run.scaler.load_state_dict(state.scaler)


def _restore_average(run: Run, checkpoint: Checkpoint, state: TrainingState) -> None:
    if run.average is None:
        return
    # If the checkpoint has no average, these are the weights being trained.
    load_weights(run.average.module, checkpoint.weights, checkpoint.source)
    run.average.updates = state.updates or 0


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the memory format of their parameters, as fused optimizers require; it may have changed."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _log_resume(run: Run, checkpoint: Checkpoint, state: TrainingState) -> None:
    source = checkpoint.source
    changed = changed_settings(checkpoint.config or {}, run.config.to_dict())
    now = run.conditions
    before = {name: value for name, value in state.conditions.items() if name in now and value != now[name]}
    run.logger.write("resume", run.global_step, file=source, changed=[*changed, *before])
    position = f" and {run.step} of {run.plan.steps_per_epoch} steps" if run.step else ""
    run.logger.print(f"resumed {source} after epoch {run.epoch}{position}")
    if changed:
        run.logger.warn(f"settings changed since {source}: {', '.join(changed)}")
    trained_in = (checkpoint.config or {}).get("train", {}).get("precision")
    if "precision" not in state.conditions and trained_in == run.config.train.precision == "tf32":
        run.logger.print(f"{source} is from a version that called tf32 float32; continuing with tf32")
    if state.annotations_sha256 != run.annotations_sha256:
        run.logger.warn(f"{run.dataset.annotation_file} is not the file that {source} was trained with")
    if before.pop("training images", None):
        run.logger.warn(f"the images in {run.dataset.image_root} are not those that {source} was trained with")
    if before.pop("validation annotations", None):
        run.logger.warn(
            f"the validation annotations are not those of {source}: best.pth is chosen by AP on two different sets"
        )
    if before:
        texts = [f"{name} {value} -> {now[name]}" for name, value in before.items()]
        run.logger.warn(f"the run does not continue bit-identically: {', '.join(texts)} since {source}")


def _make_newest(run: Run, source: str) -> None:
    """Make the resumed step the newest checkpoint of the run folder.

    Files of later steps, left by an earlier attempt, are renamed, but never the one that is being resumed: with a
    larger global batch, its number is higher than that of its step now.
    """
    exists = True
    if distributed.is_main():
        remove_partial_files(run.folder)
        last, path = run.folder / "last.pth", run.folder / step_file(run.global_step)
        same = (last, path, Path(source))
        exists = all(file.is_file() and file.samefile(last) for file in same)
        for file in step_checkpoints(run.folder):
            if file.name > path.name and not file.samefile(source):
                file.rename(file.with_name(f"{file.name}.aside"))
                run.logger.warn(f"{file} is from a later step and was renamed to {file.name}.aside")
    if not distributed.broadcast_object(exists):
        run.save()
