"""Train SOLOv2 on COCO-format data: `python train.py [CONFIG]`, torchrun, or `--nproc N`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from solov2 import distributed
from solov2.commands.arguments import add_data_arguments, add_shared_arguments, data_places, given
from solov2.commands.exit import own_command, run_command
from solov2.compute import select_device
from solov2.config import parse_overrides
from solov2.data.build import require_data
from solov2.training.signals import Stopped
from solov2.training.train import prepare_job, splits_of, train

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
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 done, 1 failed, 2 a user's mistake, 75 stopped by SIGTERM, SIGUSR1 or SIGHUP with a checkpoint
        written, 130 after Ctrl-C (KeyboardInterrupt where `argv` was given).
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
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--learning-rate", "--lr", type=float, help="for the reference batch size of the configuration")
    parser.add_argument("--accumulate", type=int, metavar="N", help="batches per optimizer step")
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
    flags = ("--nproc", "--device", "--precision", "--batch-size", "--workers", "--set", "--overwrite")
    recipe = "default: the configuration's"
    add_shared_arguments(
        parser, *flags, notes={"--precision": recipe, "--batch-size": recipe, "--overwrite": "the whole run folder"}
    )
    add_data_arguments(parser)
    return parser.parse_args(argv)


def _run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    overrides = parse_overrides(args.set) | given(args, FLAGS)
    what: dict[str, Any] = {
        "data": data_places(args),
        "weights": args.weights,
        "output": args.output,
        "resume": False if args.resume is None else True if args.resume == "auto" else args.resume,
        "overwrite": args.overwrite,
    }
    if args.dry_run:
        return _dry_run(args, what, overrides)
    if args.nproc is not None and distributed.launched_processes(args.nproc) != args.nproc:
        # A mistake that can be seen now is reported once, instead of by each of the processes.
        config = prepare_job(args.config, **what, overrides=overrides).config
        if not config.data.shapes:
            require_data(config.data, splits=splits_of(config))
        distributed.relaunch(args.nproc, [*own_command("train"), *distributed.without_nproc(argv)], args.device)
    try:
        train(args.config, **what, device=args.device, tensorboard=args.tensorboard, **overrides)
    except Stopped as stopped:
        if distributed.launched_rank() == 0:
            print(stopped, file=sys.stderr)
        return stopped.code
    return 0


def _dry_run(args: argparse.Namespace, what: dict[str, Any], overrides: dict[str, Any]) -> int:
    from solov2.training.dry_run import describe  # of no use to a real run

    config = prepare_job(args.config, **what, overrides=overrides, writes=False).config
    if args.nproc is not None:
        distributed.launched_processes(args.nproc)
    device = select_device(args.device)
    with distributed.process_group(device):
        if distributed.is_main():
            processes = args.nproc or distributed.world_size()
            describe(config, device=device, processes=processes, splits=splits_of(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
