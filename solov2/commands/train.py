"""Train SOLOv2 on COCO-format data: `python train.py [CONFIG]`, torchrun, or `--nproc N`."""

from __future__ import annotations

import argparse
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
    with_classes,
)
from solov2.commands.dry_run import describe
from solov2.commands.errors import run_command
from solov2.commands.picture import draw_predictions
from solov2.commands.run import (
    Plan,
    Run,
    announcement,
    check_folder,
    class_difference,
    open_folder,
    plan_run,
    resume,
    run_schedule,
    save,
)
from solov2.config import Config, InputError
from solov2.data.coco import CocoInstances
from solov2.engine import evaluate, predictor, train_one_epoch
from solov2.evaluation.coco import CocoEvaluator, format_table
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
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 failed, 2 a user's mistake, 130 interrupted)."""
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
        help="go on with a checkpoint; without FILE, with the last one of the run folder",
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
    distributed.start(device)
    try:
        return _train(config, args, device, folder, checkpoint)
    except KeyboardInterrupt:
        print(
            f"interrupted; go on with: --resume --output {folder}"
            if latest_checkpoint(folder)
            else "interrupted before the first checkpoint",
            file=sys.stderr,
        )
        return 130
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
    torch.manual_seed(config.train.seed)
    model = _initial_model(config, dataset, args.weights, from_checkpoint=checkpoint is not None)
    model = prepare_for_training(model, config, device)
    train = config.train
    optimizer = build_optimizer(
        model,
        name=train.optimizer,
        learning_rate=train.learning_rate,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        decay_norms=train.decay_norms,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
    open_folder(folder, config, overwrite=args.overwrite and checkpoint is None)
    logger = RunLogger(folder, main=distributed.is_main(), tensorboard=args.tensorboard)
    run = Run(config, folder, device, model, dataset, optimizer, scaler, logger)
    if checkpoint is not None:
        resume(run, checkpoint)
    try:
        summary = _train_epochs(run, validation)
        logger.say(f"trained in {format_seconds(time.perf_counter() - started)}; checkpoint {folder / 'last.pth'}")
        if summary is not None:
            logger.say(format_table(summary))
            if distributed.is_main():
                picture = draw_predictions(
                    model, validation, count=train.picture_images, score_threshold=train.picture_score
                )
                picture.save(folder / "predictions.png")
            logger.say(
                f"mask AP {summary['segm']['AP']:.3f}, AP50 {summary['segm']['AP50']:.3f}; "
                f"predictions beside ground truth in {folder / 'predictions.png'}"
            )
    finally:
        logger.close()
    return 0


def _train_epochs(run: Run, validation: CocoInstances | None) -> dict[str, Any] | None:
    """All epochs that are left; returns the summary of the last evaluation."""
    config, train, logger = run.config, run.config.train, run.logger
    loader, sampler = training_loader(config, run.dataset, build_assigner(config.model))
    plan = plan_run(train, images=len(run.dataset), batches=len(sampler), processes=distributed.world_size())
    steps_per_epoch = plan.steps_per_epoch
    _announce(run, plan)
    schedule = run_schedule(train, steps_per_epoch)
    criterion = build_criterion(config.model, mask_weight=train.mask_weight)
    model = wrap(run.model, run.device)
    summary = None
    while run.epoch < train.epochs:
        sampler.set_epoch(run.epoch)
        train_one_epoch(
            model,
            criterion,
            loader,
            run.optimizer,
            schedule,
            learning_rate=plan.learning_rate,
            device=run.device,
            epoch=run.epoch,
            steps_per_epoch=steps_per_epoch,
            total_steps=steps_per_epoch * train.epochs,
            logger=logger,
            precision=train.precision,
            scaler=run.scaler,
            accumulate=train.accumulate,
            clip_norm=train.clip_norm,
            memory_format=choose_memory_format(config, run.device),
            log_every=train.log_every,
        )
        run.epoch += 1
        distributed.broadcast_buffers(run.model)
        last = run.epoch == train.epochs
        if last or run.epoch % train.checkpoint_every == 0:
            save(run, "last.pth")
        if validation is not None and (last or run.epoch % train.evaluate_every == 0):
            summary = _evaluate(run, validation)
    if summary is None and validation is not None:
        summary = _evaluate(run, validation)  # resumed after the last epoch
    return summary


def _evaluate(run: Run, validation: CocoInstances) -> dict[str, Any]:
    evaluator = CocoEvaluator(validation.coco, validation.category_ids)
    predict = predictor(
        run.model,
        device=run.device,
        precision=run.config.train.precision,
        memory_format=choose_memory_format(run.config, run.device),
    )
    summary = evaluate(predict, validation_loader(run.config, validation), evaluator, progress=distributed.is_main())
    figures = {f"{kind}_{name}": value for kind in ("segm", "bbox") for name, value in summary[kind].items()}
    run.logger.write("evaluation", run.epoch, **figures)
    run.logger.say(f"epoch {run.epoch}: mask AP {summary['segm']['AP']:.3f}, box AP {summary['bbox']['AP']:.3f}")
    if summary["segm"]["AP"] > run.best:
        run.best = summary["segm"]["AP"]
        save(run, "best.pth")
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


def _announce(run: Run, plan: Plan) -> None:
    parameters = sum(p.numel() for p in run.model.parameters())
    run.logger.write(
        "start",
        device=str(run.device),
        processes=plan.processes,
        torch=torch.__version__,
        learning_rate=plan.learning_rate,
        global_batch=plan.global_batch,
        steps_per_epoch=plan.steps_per_epoch,
        parameters=parameters,
        seed=run.config.train.seed,
    )
    for line in announcement(run.config, plan, parameters=parameters, images=len(run.dataset), device=run.device):
        run.logger.say(line)


def _print_warning(message: Warning | str, *_details: object) -> None:
    if distributed.is_main():
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
