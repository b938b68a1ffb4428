"""Train SOLOv2 on COCO-format data: `python train.py [CONFIG]`, torchrun, or `--nproc N`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from solov2 import distributed
from solov2.build import (
    build_assigner,
    build_model,
    construct,
    find_weights,
    fit_to_weights,
    load_pretrained_backbone,
    prepare_for_training,
)
from solov2.check_data import quick_check
from solov2.checkpoint import is_own, latest_checkpoint, load_file
from solov2.commands.data import (
    add_data_arguments,
    prepare_data,
    require_data,
    resolve_config,
    training_dataset,
    training_loader,
    validation_dataset,
    with_classes,
)
from solov2.commands.dry_run import describe
from solov2.commands.epochs import show_summary, train_epochs
from solov2.commands.folder import check_agreement, check_folder, run_folder, started_again
from solov2.commands.machine import environment
from solov2.commands.run import (
    Run,
    announcement,
    class_difference,
    config_text,
    determinism,
    file_sha256,
    plan_run,
    resume,
    write_config,
)
from solov2.commands.stop import INTERRUPTED, Stopped
from solov2.config import Config, InputError
from solov2.convert import read_weights
from solov2.data.coco import CocoInstances
from solov2.errors import run_command
from solov2.logger import RunLogger, format_seconds
from solov2.models.solov2 import SOLOv2
from solov2.optim import WeightAverage, build_optimizer

DEFAULT = "solov2_r50_fpn_1x"
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
        The exit code: 0 done, 1 failed, 2 a user's mistake, 75 stopped by SIGTERM, SIGUSR1 or SIGHUP with a checkpoint
        written, 130 after Ctrl-C.
    """
    return run_command(_run, argv)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of train.py."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train SOLOv2. Without a configuration: solov2_r50_fpn_1x on data/coco.",
        epilog="several GPUs: torchrun --nproc-per-node 8 train.py CONFIG, or python train.py CONFIG --nproc 8",
    )
    parser.add_argument(
        "config",
        nargs="?",
        help="model name or YAML file (default: solov2_r50_fpn_1x, or with --resume what the run was started with)",
    )
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
    # What can be seen to be wrong is said before other processes are started: each of them would say it again.
    config, folder, checkpoint = _configuration(args)
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
    try:
        with (
            distributed.process_group(device, timeout=config.train.stall_seconds),
            determinism(config.train.deterministic),
        ):
            return _train(config, args, device, folder, checkpoint)
    except (KeyboardInterrupt, Stopped) as stopped:
        if distributed.is_main():
            reason = "interrupted" if isinstance(stopped, KeyboardInterrupt) else f"stopped by {stopped}"
            way_on = f"go on with: --resume --output {folder}" if latest_checkpoint(folder) else "no checkpoint yet"
            print(f"{reason}; {way_on}", file=sys.stderr)
        return INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else stopped.code


def _configuration(args: argparse.Namespace) -> tuple[Config, Path, Path | None]:
    """The configuration with the flags applied, the run folder, and the checkpoint to go on with.

    The configuration is the named one; where none is named, the one that the checkpoint carries.
    """
    named = args.config is not None
    if not named:
        args.config = DEFAULT
    config = resolve_config(args, FLAGS)
    folder = Path(args.output or f"runs/{config.name}")
    # A dry run writes nothing, so it minds only a checkpoint that it was asked to go on with.
    checkpoint = None if args.dry_run and args.resume is None else check_folder(folder, args.resume, args.overwrite)
    if checkpoint is not None and not named:
        content = load_file(checkpoint)
        if is_own(content) and "config" in content:
            args.config = Config.from_checkpoint(content["config"], source=str(checkpoint))
            config = resolve_config(args, FLAGS)
    return config, folder, checkpoint


def _dry_run(config: Config, args: argparse.Namespace) -> int:
    if args.nproc is not None:
        distributed.check_nproc(args.nproc)
    device = distributed.select_device(args.device)
    with distributed.process_group(device):
        if distributed.is_main():
            processes = args.nproc or distributed.world_size()
            describe(config, device=device, processes=processes, splits=_splits(config))
    return 0


def _splits(config: Config) -> Sequence[str]:
    return ("train", "val") if config.train.evaluate_every else ("train",)


def _train(
    config: Config, args: argparse.Namespace, device: torch.device, folder: Path, checkpoint: Path | None
) -> int:
    started = time.perf_counter()
    check_agreement(None if checkpoint is None else checkpoint.name, folder)
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
    loader, sampler = training_loader(config, dataset, build_assigner(config.model), device=device)
    plan = plan_run(train, images=len(dataset), batches=len(sampler), processes=distributed.world_size())
    with (
        run_folder(folder, emptied=_is_to_be_emptied(folder, checkpoint, args)),
        contextlib.closing(RunLogger(folder, main=distributed.is_main(), tensorboard=args.tensorboard)) as logger,
    ):
        average = WeightAverage(model, train.ema_decay) if train.ema_decay else None
        run = Run(config, folder, device, model, dataset, optimizer, scaler, logger, plan, average)
        run.annotations_sha256 = file_sha256(dataset.annotation_file)
        _announce(run)
        for sentence in quick_check(dataset, config) if distributed.is_main() else ():
            logger.write("warning", text=sentence)
            logger.say(f"warning: {sentence}")
        if checkpoint is not None:
            resume(run, checkpoint)
        write_config(run)
        summary = train_epochs(run, loader, sampler, validation)
        logger.say(f"trained in {format_seconds(time.perf_counter() - started)}; checkpoint {folder / 'last.pth'}")
        if summary is not None:
            show_summary(run, validation, summary)
    return 0


def _is_to_be_emptied(folder: Path, checkpoint: Path | None, args: argparse.Namespace) -> bool:
    """--overwrite belongs to the first start of a launch, and never takes the checkpoint it goes on with."""
    inside = checkpoint is not None and checkpoint.parent.resolve() == folder.resolve()
    return args.overwrite and not inside and not started_again(folder)


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
        names = read_weights(load_file(weights), weights)[2]
        if names is not None and len(names) == len(dataset.class_names) and names != dataset.class_names:
            warnings.warn(
                f"{weights} was trained on other classes than {dataset.annotation_file} has: "
                f"{class_difference(names, dataset.class_names)}; as many, so the category layer is kept",
                stacklevel=1,
            )
        model.class_names = dataset.class_names
        return model
    model = construct(config.model, dataset.class_names)
    if not from_checkpoint:
        load_pretrained_backbone(model.backbone, config.model.backbone, config.train.pretrained_backbone)
    return model


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
        annotations_sha256=run.annotations_sha256,
        **environment(run.device),
    )
    for line in announcement(config, plan, parameters=parameters, images=len(run.dataset), device=run.device):
        run.logger.say(line)


if __name__ == "__main__":
    sys.exit(main())
