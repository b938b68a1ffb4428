"""`solov2.train()`, which the train command runs."""

from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from solov2 import distributed
from solov2.build import (
    add_auxiliary_head,
    build_assigner,
    build_compute,
    build_model,
    construct,
    prepare_for_training,
)
from solov2.checkpoint import Checkpoint
from solov2.compute import Compute, select_device
from solov2.config import Config
from solov2.data.build import (
    prepare_data,
    training_dataset,
    training_loader,
    with_classes,
    worker_count,
)
from solov2.data.image_dataset import ImageDataset
from solov2.data.watch import kill_children, shared_memory_warning
from solov2.data_check.quick import quick_check
from solov2.errors import InputError, count
from solov2.evaluation.summary import flatten
from solov2.models.solov2 import SOLOv2
from solov2.outputs import replace_file
from solov2.proposal.files import write_files
from solov2.training.backbone import load_pretrained_backbone
from solov2.training.callbacks import Callback, TensorBoard, check_callbacks, tensorboard_writer
from solov2.training.dry_run import max_padded_size
from solov2.training.environment import conditions, environment, file_sha256
from solov2.training.epochs import train_epochs
from solov2.training.folder import check_ranks_agree, latest_checkpoint, run_folder
from solov2.training.guard import DELAY
from solov2.training.job import Job, prepare_job, splits_of
from solov2.training.logger import RunLogger, format_seconds
from solov2.training.optim import WeightAverage, build_optimizer
from solov2.training.plan import Plan, announcement, config_text, hopeless_settings
from solov2.training.randomness import determinism
from solov2.training.resume import resume as resume_run
from solov2.training.run import Run
from solov2.training.signals import stop_message
from solov2.training.validation import open_validation, show_summary

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of a run: its folder, its best and last checkpoints, and the metrics of its last evaluation.

    Attributes:
        folder: the run folder.
        best: checkpoint with the highest mask AP, or PQ for panoptic models; None if nothing was evaluated.
        last: newest checkpoint.
        metrics: "segm_AP", "segm_AP50", ..., "bbox_AR100", fractions in [0, 1] (-1 without ground truth); for panoptic
            models "all_pq", "all_sq", "all_rq", "all_n", "things_pq", ..., "stuff_n" (absent without ground truth).
            Empty if nothing was evaluated.
    """

    folder: Path
    best: Path | None
    last: Path | None
    metrics: dict[str, float]


def train(
    name_or_config: str | Path | Config | None = None,
    *,
    data: str | Path | Dataset | Mapping[str, str | Path | Dataset] | None = None,
    weights: str | Path | Checkpoint | None = None,
    output: str | Path | None = None,
    resume: bool | str | Path | None = False,
    device: str | None = None,
    overwrite: bool = False,
    propose: bool = False,
    tensorboard: bool = False,
    max_hours: float | None = None,
    callbacks: Sequence[Callback] = (),
    **overrides: Any,
) -> TrainResult:
    """Train and evaluate a SOLOv2 model. Under torchrun, every process calls this and they train together.

    Outside the main thread (Streamlit, some notebooks), signals are left to the caller and do not stop the run.

    Args:
        name_or_config: model name (`solov2.list_models`), path of a YAML file, or a configuration; default:
            solov2_r50_fpn_1x, or with `resume` the configuration of the checkpoint.
        data: the data, in one of these forms; default: from the configuration.
            A folder with annotations/, train2017/ and val2017/.
            A folder in another layout or format, whose annotations are found (`solov2.proposal.find`) and, if
            necessary, written to OUTPUT.data.
            Some of {"train_annotations", "train_images", "val_annotations", "val_images"}; for panoptic data also
            "train_segments" and "val_segments", the folders of the PNGs.
            A dataset of (image, instances), see `solov2.formats.torch_dataset`, or {"train": dataset, "val": dataset};
            the annotations are written to OUTPUT.data.
        weights: checkpoint of any family to start from, or "official" for the published one; default: an ImageNet
            backbone.
        output: run folder; default: runs/NAME.
        resume: True to resume from the newest readable checkpoint of the run folder, or a checkpoint file; the run
            continues bit-identically.
        device: e.g. "cpu"; default: the accelerator of this process, if there is one.
        overwrite: replace the contents of the run folder.
        propose: if `data` is a dataset, or a folder in another layout than COCO's, also adapt the settings that are not
            among `overrides` to the data, as the command does (`solov2.proposal.propose`).
        tensorboard: also write event files (needs the extra `tensorboard`).
        max_hours: no step starts later than this many hours after the call; the run then stops with a checkpoint. An
            evaluation in progress is completed, and a resumed run has a limit of its own. Default: no limit.
        callbacks: functions that receive the rows of log.jsonl as soon as they are written, in a thread of process 0;
            one that returns True stops the run with a checkpoint. See `solov2.training.callbacks`.
        overrides: fields of any section of the configuration, e.g. epochs=24, batch_size=4, num_classes=3.

    Returns:
        The run folder, its checkpoints and the metrics of the last evaluation.

    Raises:
        InputError: an argument is invalid or the data is broken; raised before anything is written where possible.
        RunFailed: a loss is not finite, memory ran out, or a process hung or died. The subclass
            `solov2.training.signals.Stopped` means that a signal, `max_hours` or a callback stopped the run.
        OSError: the disk is full or there is no permission; existing checkpoints stay intact.
        KeyboardInterrupt: Ctrl-C before the first step, or a second Ctrl-C.
    """
    if max_hours is not None and not 0 < max_hours < math.inf:
        raise InputError(f"max_hours (--max-hours) must be a number of hours above 0, got {max_hours}")
    deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
    check_callbacks(callbacks)
    if tensorboard:
        tensorboard_writer()  # report its absence before a run folder is cleared
    job = prepare_job(
        name_or_config,
        data=data,
        weights=weights,
        output=output,
        resume=resume,
        overwrite=overwrite,
        overrides=overrides,
        propose=propose,
    )
    if tensorboard:
        callbacks = [*callbacks, TensorBoard(job.folder)]
    chosen = select_device(device)
    earlier_children = set(multiprocessing.active_children())
    try:
        with (
            distributed.process_group(chosen, timeout=job.config.train.stall_seconds),
            determinism(job.config.train.deterministic),
        ):
            compute = build_compute(job.config, chosen)
            return _run_job(job, compute, callbacks=callbacks, deadline=deadline)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(stop_message(signal.SIGINT, job.folder)) from error
    finally:
        kill_children(exclude=earlier_children)


def _run_job(job: Job, compute: Compute, *, callbacks: Sequence[Callback], deadline: float) -> TrainResult:
    started = time.perf_counter()
    checkpoint = job.resume_from
    check_ranks_agree(None if checkpoint is None else Path(checkpoint.source).name, job.folder)
    if job.data_folder is not None and distributed.is_main():
        write_files(job.data_folder, job.files)
        for line in [*job.notes, *(f"wrote {job.data_folder / name}" for name in job.files)]:
            LOG.info("%s", line)
    prepare_data(job.config, splits=splits_of(job.config))
    dataset = training_dataset(job.config, job.sources.get("train"))
    validation = open_validation(job.config, dataset, job.sources.get("val"))
    config = with_classes(job.config, dataset)
    if distributed.is_main():
        for now, before, what in (
            (config.model.num_classes, job.config.model.num_classes, ("class", "classes")),
            (config.model.num_stuff, job.config.model.num_stuff, ("stuff class", "stuff classes")),
        ):
            if now != before:
                LOG.info("%s, from %s (the configuration has %d)", count(now, *what), dataset.annotation_file, before)
    torch.manual_seed(config.train.seed)
    model = add_auxiliary_head(_initial_model(config, dataset, job), config)
    model = prepare_for_training(model, config, compute)
    optimizer = build_optimizer(
        model,
        name=config.train.optimizer,
        learning_rate=config.train.learning_rate,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
        decay_norms=config.train.decay_norms,
        backbone_rates=config.train.backbone_rates,
    )
    loader, sampler = training_loader(config, dataset, build_assigner(config.model), device=compute.device)
    processes = distributed.world_size()
    plan = Plan.of(config.train, images=len(dataset), batches=len(sampler), processes=processes)
    with (
        run_folder(job.folder, clear=job.clear_folder),
        RunLogger(job.folder, main=distributed.is_main(), callbacks=callbacks) as logger,
    ):
        run = Run(
            config=config,
            folder=job.folder,
            compute=compute,
            plan=plan,
            model=model,
            optimizer=optimizer,
            scaler=compute.scaler(),
            average=WeightAverage(model, config.train.ema_decay) if config.train.ema_decay else None,
            dataset=dataset,
            annotations_sha256=file_sha256(dataset.annotation_file) if distributed.is_main() else "",
            conditions=conditions(compute, dataset, validation) if distributed.is_main() else {},
            logger=logger,
        )
        _announce(run)
        weights = checkpoint is not None or job.initial_weights is not None
        for text in hopeless_settings(config, plan, weights=weights):
            logger.warn(text)
        for text in quick_check(dataset, config) if distributed.is_main() else ():
            logger.warn(text)
        scarce = shared_memory_warning(*_batches_in_flight(config))
        if scarce is not None:
            logger.warn(scarce)
        if checkpoint is not None:
            resume_run(run, checkpoint)
        job.initial_weights = job.resume_from = checkpoint = None  # free the memory of the weights and moments
        _write_config(run)
        summary = train_epochs(run, loader, sampler, validation, deadline=deadline)
        seconds = time.perf_counter() - started + sum(logger.earlier_seconds)
        starts = 1 + len(logger.earlier_seconds)
        over = f" over {starts} starts" if starts > 1 else ""
        logger.print(f"trained in {format_seconds(seconds)}{over}; checkpoint {job.folder / 'last.pth'}")
        if summary is not None and validation is not None:
            show_summary(run, validation, summary)
        best = job.folder / "best.pth"
        metrics = {} if summary is None else flatten(summary)
        return TrainResult(job.folder, best if best.is_file() else None, latest_checkpoint(job.folder), metrics)


def _initial_model(config: Config, dataset: ImageDataset, job: Job) -> SOLOv2:
    weights = job.initial_weights
    if weights is None:
        model = construct(config.model, dataset.class_names, dataset.stuff_names)
        if job.resume_from is None:
            load_pretrained_backbone(model.backbone, config.model.backbone, config.train.pretrained_backbone)
        return model
    stuff_names = dataset.stuff_names or None
    return build_model(config, weights=weights, class_names=dataset.class_names, stuff_names=stuff_names)


def _batches_in_flight(config: Config) -> tuple[int, int]:
    """(bytes of the pixels of the largest batch, batches in shared memory at the same time on this machine)."""
    data, train = config.data, config.train
    pixels = math.prod(max_padded_size(config))
    # Each worker prepares torch's default of two; `guard` holds those of the latest steps.
    workers = worker_count(data.workers)
    batches = 2 * workers + (DELAY + 1) * train.accumulate if workers else 0
    return 3 * pixels * train.batch_size, batches * distributed.local_world_size()


def _announce(run: Run) -> None:
    plan, config, device = run.plan, run.config, run.compute.device
    parameters = sum(p.numel() for p in run.model.parameters())
    run.logger.write(
        "start",
        learning_rate=plan.learning_rate,
        global_batch=plan.global_batch,
        steps_per_epoch=plan.steps_per_epoch,
        parameters=parameters,
        seed=config.train.seed,
        configuration_sha256=hashlib.sha256(config_text(config).encode()).hexdigest(),
        annotations_sha256=run.annotations_sha256,
        **environment(device),
    )
    for line in announcement(config, plan, parameters=parameters, images=len(run.dataset), compute=run.compute):
        run.logger.print(line)


def _write_config(run: Run) -> None:
    if distributed.is_main():
        with replace_file(run.folder / "config.yaml") as file:
            file.write(config_text(run.config).encode())
