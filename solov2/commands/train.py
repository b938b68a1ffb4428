"""Train SOLOv2 on data in COCO's format: `python train.py [MODEL]`, torchrun, or `--nproc N`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solov2.commands.arguments import (
    RUN_FLAGS,
    Parser,
    add_data_arguments,
    add_model_argument,
    add_setting,
    add_shared_arguments,
    data_places,
    given,
)
from solov2.commands.exit import own_command, run_command
from solov2.commands.screen import show
from solov2.config import DEFAULT_MODEL, override_config, parse_overrides
from solov2.errors import SAVE_TRAINING_MEMORY, InputError
from solov2.outputs import check_outputs

SETTINGS = (
    ("--epochs",),
    ("--learning-rate", "--lr"),
    ("--accumulate",),
    ("--optimizer",),
    ("--evaluate-every",),
    ("--seed",),
)
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
    "workers": "data.workers",
    "classes": "data.classes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 done, 1 failed, 2 user error, 75 stopped by SIGTERM, SIGUSR1, SIGHUP or --max-hours with a
        checkpoint written, 130 after Ctrl-C (KeyboardInterrupt if `argv` was given).
    """
    return run_command("train", build_parser, _run, argv, save_memory=SAVE_TRAINING_MEMORY)


def build_parser(typed: str = "solov2 train") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    default = "default: from the configuration"
    parser = Parser(
        prog=typed,
        description="Train SOLOv2 on data in COCO's format.",
        epilog="several GPUs: --nproc 8, or torchrun --nproc-per-node 8 train.py MODEL",
    )
    add_model_argument(parser, default=f"{DEFAULT_MODEL}; with --resume, the model of the run")
    parser.add_argument("--output", metavar="DIR", help="run folder (default: runs/NAME)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="resume from a checkpoint; without FILE, from the newest readable one in the run folder (default: no)",
    )
    for flags in SETTINGS:
        add_setting(parser, *flags, default="from the configuration")
    parser.add_argument(
        "--deterministic",
        action="store_const",
        const=True,
        help=f"bit-identical results for the same seed, number of processes and device, or an error ({default})",
    )
    parser.add_argument(
        "--max-hours",
        type=float,
        metavar="X",
        help="stop X hours after this start, with a checkpoint for --resume and exit code 75 (default: no limit)",
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard event files")
    parser.add_argument(
        "--no-proposal",
        dest="propose",
        action="store_false",
        help="also keep the recipe's settings for data in another layout or format than COCO's (default: settings that "
        "suit such data are proposed, printed, written to DIR.data beside the run folder, and used)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, learning rates, batch sizes and memory of the run, and exit",
    )
    parser.add_argument(
        "--pictures",
        metavar="FILE",
        help="with --dry-run: draw the first training samples, augmented, beside their images (default: no)",
    )
    add_shared_arguments(
        parser,
        "--weights",
        "--classes",
        *RUN_FLAGS,
        notes={
            "--weights": "default: an ImageNet backbone",
            "--precision": default,
            "--batch-size": default,
            "--workers": "per process; default: from the configuration",
            "--overwrite": "the whole run folder, or the file of --pictures; default: no",
        },
    )
    add_data_arguments(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2 import distributed
    from solov2.data.build import require_data
    from solov2.training.job import prepare_job, splits_of
    from solov2.training.signals import Stopped
    from solov2.training.train import train

    overrides = parse_overrides(args.set) | given(args, FLAGS)
    job: dict[str, Any] = {
        "data": data_places(args),
        "weights": args.weights,
        "output": args.output,
        "resume": False if args.resume is None else True if args.resume == "auto" else args.resume,
        "overwrite": args.overwrite,
        "propose": args.propose,
    }
    if args.dry_run:
        return _dry_run(args, job, overrides)
    if args.pictures is not None:
        raise InputError("--pictures is for --dry-run; a run draws its predictions by itself")
    if args.nproc is not None and distributed.launched_processes(args.nproc) != args.nproc:
        # Report a mistake once, before the launch, and not in every process.
        prepared = prepare_job(args.model, **job, overrides=overrides, processes=args.nproc)
        if not prepared.config.data.shapes and prepared.data_folder is None:  # what was found is there
            require_data(prepared.config, splits=splits_of(prepared.config))
        distributed.relaunch(args.nproc, [*own_command("train"), *distributed.without_nproc(args.words)], args.device)
    try:
        train(
            args.model,
            **job,
            device=args.device,
            tensorboard=args.tensorboard,
            max_hours=args.max_hours,
            **overrides,
        )
    except Stopped as stopped:
        if distributed.launched_rank() == 0:
            show(str(stopped), file=sys.stderr)
        return stopped.code
    return 0


def _dry_run(args: argparse.Namespace, job: dict[str, Any], overrides: dict[str, Any]) -> int:
    from solov2 import distributed
    from solov2.compute import select_device
    from solov2.data.build import split_paths
    from solov2.proposal.files import write_files
    from solov2.training.dry_run import describe
    from solov2.training.job import prepare_job, splits_of

    if args.nproc is not None:
        distributed.launched_processes(args.nproc)
    prepared = prepare_job(args.model, **job, overrides=overrides, processes=args.nproc, writes=False)
    config, weights = prepared.config, (prepared.initial_weights or prepared.resume_from) is not None
    annotations = [split_paths(config.data, split)[0] for split in splits_of(config)]
    inputs = [args.model, args.weights, args.resume, *annotations]
    check_outputs([("--pictures", args.pictures)], overwrite=args.overwrite, inputs=inputs)
    device = select_device(args.device)
    with distributed.process_group(device), tempfile.TemporaryDirectory() as aside:
        if distributed.is_main():
            processes = args.nproc or distributed.world_size()
            splits = splits_of(config)
            place = str(prepared.data_folder)
            if prepared.data_folder is not None:  # the files that a run would write, where nobody finds them
                show(*prepared.notes, "")
                write_files(Path(aside), prepared.files)
                paths = {key: getattr(config.data, key) for key in ("train_annotations", "val_annotations")}
                place = os.path.abspath(place)
                config = override_config(
                    config, {f"data.{key}": path.replace(place, aside, 1) for key, path in paths.items()}
                )
            described = describe(
                config, device=device, processes=processes, splits=splits, weights=weights, pictures=args.pictures
            )
            for section in described:
                show(*(line.replace(aside, place) for line in section), "")
    return 0
