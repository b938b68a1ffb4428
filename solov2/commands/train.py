"""Train SOLOv2 on COCO-format data: `python train.py [CONFIG]`, torchrun, or `--nproc N`."""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from solov2 import distributed
from solov2.build import (
    build_assigner,
    build_criterion,
    build_model,
    choose_memory_format,
    construct,
    find_weights,
    fit_to_weights,
    load_pretrained_backbone,
    prepare_for_training,
)
from solov2.check_data import quick_check
from solov2.checkpoint import latest_checkpoint
from solov2.commands.data import (
    add_data_arguments,
    prepare_data,
    require_data,
    resolve_config,
    training_dataset,
    training_loader,
    validation_dataset,
    validation_loader,
    watched,
    with_classes,
)
from solov2.commands.dry_run import describe
from solov2.commands.machine import environment
from solov2.commands.picture import draw_predictions
from solov2.commands.run import (
    Run,
    announcement,
    averaged_model,
    check_folder,
    class_difference,
    config_text,
    determinism,
    file_sha256,
    open_folder,
    plan_run,
    resume,
    run_schedule,
    save,
    save_best,
)
from solov2.commands.stop import INTERRUPTED, Stopped, StopSignal
from solov2.config import Config, InputError
from solov2.data.coco import CocoInstances
from solov2.data.loader import TrainBatchSampler
from solov2.engine import evaluate, predictor, train_one_epoch
from solov2.errors import run_command
from solov2.evaluation.coco import CocoEvaluator, format_table
from solov2.guard import NonFiniteGuard, stuck_mask_loss
from solov2.logger import RunLogger, format_seconds
from solov2.models.solov2 import SOLOv2
from solov2.optim import build_optimizer

FLAGS = {
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "learning_rate": "train.learning_rate",
    "accumulate": "train.accumulate",
    "precision": "train.precision",
    "seed": "train.seed",
    "optimizer": "train.optimizer",
    "evaluate_every": "train.evaluate_every",
    "deterministic": "train.deterministic",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 done, 1 failed, 2 a user's mistake, 75 stopped by SIGTERM or SIGUSR1 with a checkpoint written,
        130 after Ctrl-C.
    """
    return run_command(_run, argv)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of train.py."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train SOLOv2. Without a configuration: solov2_r50_fpn_1x on data/coco.",
        epilog="several GPUs: torchrun --nproc-per-node 8 train.py CONFIG, or python train.py CONFIG --nproc 8",
    )
    parser.add_argument("config", nargs="?", default="solov2_r50_fpn_1x", help="model name or YAML file")
    parser.add_argument("--output", metavar="DIR", help="run folder (default: runs/NAME)")
    parser.add_argument(
        "--weights", metavar="FILE", help="start from these weights (fine-tuning); official: the published ones"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on with a checkpoint; without FILE (or with auto), with the newest of the run folder that can be read",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the run folder holds")
    parser.add_argument("--nproc", type=int, metavar="N", help="training processes on this machine, one per GPU")
    parser.add_argument("--device", help="e.g. cpu (default: the accelerator, if there is one)")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, help="images per process")
    parser.add_argument("--learning-rate", "--lr", type=float, help="for the reference batch size of the configuration")
    parser.add_argument("--accumulate", type=int, metavar="N", help="batches per optimiser step")
    parser.add_argument("--precision", choices=("float32", "bf16", "fp16"))
    parser.add_argument("--optimizer", choices=("sgd", "adamw"))
    parser.add_argument("--evaluate-every", type=int, metavar="EPOCHS", help="0: never")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--deterministic",
        action="store_const",
        const=True,
        help="the same bits for the same seed, processes and device; an operation that cannot promise it is an error",
    )
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, learning rates, batch sizes and memory of the run, and end",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any entry of the configuration, e.g. model.input_scale=[1333,640]",
    )
    add_data_arguments(parser)
    return parser.parse_args(argv)


def _run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    config = resolve_config(args, FLAGS)
    warnings.showwarning = _print_warning
    # What can be seen to be wrong is said before other processes are started: each of them would say it again.
    folder = Path(args.output or f"runs/{config.name}")
    # A dry run writes nothing, so it minds only a checkpoint that it was asked to go on with.
    checkpoint = None if args.dry_run and args.resume is None else check_folder(folder, args.resume, args.overwrite)
    args.weights = find_weights(args.weights, config)
    if checkpoint or args.weights:  # a resumed run keeps what the weights it started from had fixed
        config = replace(config, model=fit_to_weights(config.model, checkpoint or args.weights))
    if args.dry_run:
        return _dry_run(config, args)
    if not config.data.shapes:
        require_data(config.data, splits=_splits(config))
    if args.nproc is not None:
        distributed.relaunch(args.nproc, [sys.argv[0], *distributed.without_nproc(argv)], args.device)
    device = distributed.select_device(args.device)
    distributed.start(device, timeout=config.train.stall_seconds)
    try:
        with determinism(config.train.deterministic):
            return _train(config, args, device, folder, checkpoint)
    except (KeyboardInterrupt, Stopped) as stopped:
        if distributed.is_main():
            reason = "interrupted" if isinstance(stopped, KeyboardInterrupt) else f"stopped by {stopped}"
            way_on = f"go on with: --resume --output {folder}" if latest_checkpoint(folder) else "no checkpoint yet"
            print(f"{reason}; {way_on}", file=sys.stderr)
        return INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else stopped.code
    finally:
        distributed.stop()


def _dry_run(config: Config, args: argparse.Namespace) -> int:
    if args.nproc is not None:
        distributed.check_nproc(args.nproc)
    device = distributed.select_device(args.device)
    distributed.start(device)
    try:
        if distributed.is_main():
            processes = args.nproc or distributed.world_size()
            describe(config, device=device, processes=processes, splits=_splits(config))
    finally:
        distributed.stop()
    return 0


def _splits(config: Config) -> Sequence[str]:
    return ("train", "val") if config.train.evaluate_every else ("train",)


def _train(
    config: Config, args: argparse.Namespace, device: torch.device, folder: Path, checkpoint: Path | None
) -> int:
    started = time.perf_counter()
    prepare_data(config, splits=_splits(config))
    dataset = training_dataset(config.data)
    validation = _validation(config, dataset)
    config = _explain_classes(with_classes(config, dataset), config)
    train = config.train
    torch.manual_seed(train.seed)
    model = _initial_model(config, dataset, args.weights, from_checkpoint=checkpoint is not None)
    model = prepare_for_training(model, config, device)
    optimizer = build_optimizer(
        model,
        name=train.optimizer,
        learning_rate=train.learning_rate,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        decay_norms=train.decay_norms,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
    loader, sampler = training_loader(config, dataset, build_assigner(config.model))
    plan = plan_run(train, images=len(dataset), batches=len(sampler), processes=distributed.world_size())
    open_folder(folder, config, overwrite=args.overwrite and checkpoint is None and not distributed.restarted())
    logger = RunLogger(folder, main=distributed.is_main(), tensorboard=args.tensorboard)
    average = averaged_model(model, train.ema_decay) if train.ema_decay else None
    run = Run(config, folder, device, model, dataset, optimizer, scaler, logger, plan, average)
    try:
        _announce(run)
        for sentence in quick_check(dataset, config) if distributed.is_main() else ():
            logger.write("warning", text=sentence)
            logger.say(f"warning: {sentence}")
        if checkpoint is not None:
            resume(run, checkpoint)
        summary = _train_epochs(run, loader, sampler, validation)
        logger.say(f"trained in {format_seconds(time.perf_counter() - started)}; checkpoint {folder / 'last.pth'}")
        if summary is not None:
            _show(run, validation, summary)
    finally:
        logger.close()
    return 0


def _show(run: Run, validation: CocoInstances, summary: dict[str, Any]) -> None:
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


def _train_epochs(
    run: Run, loader: DataLoader, sampler: TrainBatchSampler, validation: CocoInstances | None
) -> dict[str, Any] | None:
    """All steps and evaluations that are left; returns the summary of the last evaluation."""
    config, train, plan = run.config, run.config.train, run.plan
    schedule = run_schedule(train, plan.steps_per_epoch)
    criterion = build_criterion(config.model, mask_weight=train.mask_weight)
    model = wrap(run.model, run.device)
    guard = NonFiniteGuard(run.folder, skip=train.nonfinite == "skip", file_name=run.dataset.file_name)
    summary = None
    with StopSignal(train.stall_seconds) as stop:
        while True:
            due = run.epoch == train.epochs or (run.epoch and run.epoch % max(1, train.evaluate_every) == 0)
            if validation is not None and due and (run.evaluated < run.epoch or run.epoch == train.epochs):
                summary = _evaluate(run, validation, stop)
            if run.epoch == train.epochs:
                return summary
            sampler.set_epoch(run.epoch, first_batch=run.step * train.accumulate)
            with stop.naming_the_silent():
                train_one_epoch(
                    model,
                    criterion,
                    watched(loader, sampler, run.dataset),
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
            if run.epoch == train.epochs or run.epoch % train.checkpoint_every == 0:
                save(run)


def _after_step(run: Run, stop: StopSignal, done: int) -> None:
    """Average the weights, save where it is time, and end the run where it was told to."""
    run.step = done
    if run.average is not None:
        run.average.update_parameters(run.model)
    signal_number = stop.poll()
    every = run.config.train.checkpoint_steps
    if signal_number or (every and done % every == 0 and done < run.plan.steps_per_epoch):
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
    loader = stop.ending(validation_loader(run.config, validation))  # the checkpoint before it is already written
    summary = evaluate(predict, loader, evaluator, overlap=run.device.type != "cpu", progress=distributed.is_main())
    figures = {f"{kind}_{name}": value for kind in ("segm", "bbox") for name, value in summary[kind].items()}
    run.evaluated = run.epoch
    run.logger.write("evaluation", run.epoch, **figures)
    run.logger.say(f"epoch {run.epoch}: mask AP {summary['segm']['AP']:.3f}, box AP {summary['bbox']['AP']:.3f}")
    if summary["segm"]["AP"] > run.best:
        run.best = summary["segm"]["AP"]
        save_best(run)
    return summary


def _validation(config: Config, dataset: CocoInstances) -> CocoInstances | None:
    if not config.train.evaluate_every:
        return None
    validation = validation_dataset(config.data)
    if validation.class_names != dataset.class_names:
        raise InputError(
            f"{validation.annotation_file} has other categories than {dataset.annotation_file}: "
            f"{class_difference(validation.class_names, dataset.class_names)}"
        )
    return validation


def _explain_classes(config: Config, before: Config) -> Config:
    if config.model.num_classes != before.model.num_classes and distributed.is_main():
        print(
            f"{config.model.num_classes} classes, as the annotation file has (the configuration says "
            f"{before.model.num_classes})"
        )
    return config


def _initial_model(config: Config, dataset: CocoInstances, weights: str | None, *, from_checkpoint: bool) -> SOLOv2:
    if weights is not None and not from_checkpoint:
        model = build_model(config, weights=weights, num_classes=config.model.num_classes)
        model.class_names = dataset.class_names
        return model
    model = construct(config.model, dataset.class_names)
    if not from_checkpoint:
        load_pretrained_backbone(model.backbone, config.model.backbone, config.train.pretrained_backbone)
    return model


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around the model where there are several processes."""
    if distributed.world_size() == 1:
        return model
    # Buffers are broadcast once per epoch instead of in every step; the flag for it got a new name in torch 2.14.
    flags = inspect.signature(DistributedDataParallel).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in flags else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type != "cpu" else None,
        gradient_as_bucket_view=True,
        **{flag: False},
    )


def _announce(run: Run) -> None:
    plan, config = run.plan, run.config
    parameters = sum(p.numel() for p in run.model.parameters())
    run.logger.write(
        "start",
        learning_rate=plan.learning_rate,
        global_batch=plan.global_batch,
        steps_per_epoch=plan.steps_per_epoch,
        parameters=parameters,
        seed=config.train.seed,
        configuration_sha256=hashlib.sha256(config_text(config).encode()).hexdigest(),
        annotations_sha256=file_sha256(run.dataset.annotation_file),
        **environment(run.device),
    )
    for line in announcement(config, plan, parameters=parameters, images=len(run.dataset), device=run.device):
        run.logger.say(line)


def _print_warning(message: Warning | str, *_details: object) -> None:
    if distributed.is_main():
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
