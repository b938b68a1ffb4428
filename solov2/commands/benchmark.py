"""Measure inference, training and data loading in images per second, by stage: `python benchmark.py [MODEL]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from solov2.commands import screen
from solov2.commands.arguments import (
    Parser,
    add_data_root,
    add_model_argument,
    add_shared_arguments,
    at_least,
    given,
    text_stream,
)
from solov2.commands.exit import own_command, run_command
from solov2.config import DEFAULT_MODEL, load_config, parse_overrides
from solov2.errors import InputError
from solov2.outputs import check_outputs, write_json

if TYPE_CHECKING:
    import torch

    from solov2.benchmarking.measure import Workload

SWEEPS = ("batch-size", "size", "candidates", "instances", "precision", "threads")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 failed, 2 user error, 130 interrupted)."""
    return run_command("benchmark", build_parser, _run, argv, save_memory="lower --batch-size or --size")


def build_parser(typed: str = "solov2 benchmark") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(
        prog=typed,
        description="Measure images per second, by stage, with random weights on synthetic images.",
        epilog="several GPUs: --nproc 8, or torchrun --nproc-per-node 8 benchmark.py MODEL",
    )
    add_model_argument(parser, default=DEFAULT_MODEL)
    text = "data: files to batches; infer: images to masks, plain and optimized; train: one optimizer step"
    parser.add_argument("--mode", choices=("all", "data", "infer", "train"), default="all", help=text)
    numbers = {
        "iterations": (1, None, "timed iterations (default: 3 on a CPU, 50 elsewhere; at least 20 for data loading)"),
        "warmup": (0, None, "warm-up iterations (default: 1 on a CPU, 20 elsewhere)"),
        "threads": (1, None, "CPU threads (default: torch's choice)"),
        "instances": (0, 8, "ground-truth ellipses per image"),
        "candidates": (0, 500, "synthetic candidates per image to post-process (random weights find none)"),
    }
    for name, (minimum, default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=at_least(minimum), default=default, metavar="N", help=text)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--compare", metavar="FILE", help="also print the ratios to an earlier report (default: none)")
    text = f"measure at several values of a flag ({', '.join(SWEEPS)}; sizes as HxW), each in its own process"
    group.add_argument("--sweep", nargs="+", metavar=("FLAG", "VALUE"), help=f"{text} (default: none)")
    add_data_root(parser, default="generated shapes")
    notes = {
        "--size": "default: the model's test scale, rounded up",
        "--batch-size": "default: train.batch_size of --set, else 1",
        "--precision": "default: train.precision of --set, else tf32",
    }
    flags = ("--device", "--nproc", "--set", "--json", "--overwrite")
    add_shared_arguments(parser, *notes, *flags, notes=notes)
    return parser


def _run(args: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keep torch's profiler from logging every start
    import torch

    from solov2 import distributed
    from solov2.benchmarking.report import compare, read_report, sweep
    from solov2.benchmarking.workloads import measure_workload
    from solov2.compute import select_device

    check_outputs([("--json", args.json)], overwrite=args.overwrite, inputs=[args.model, args.compare])
    is_main = distributed.launched_rank() == 0

    def show(text: str) -> None:
        if is_main:
            screen.show(*text.split("\n"), file=text_stream(args.json))

    if args.sweep is not None:
        report = sweep(args.sweep[0], _sweep_commands(args), show)
        failed = any("error" in each for each in report["reports"].values())
    else:
        old = None if args.compare is None else read_report(args.compare)
        _workload(args, torch.device("cpu"))  # report mistakes before processes start
        if args.nproc is not None:
            words = distributed.without_nproc(args.words)
            distributed.relaunch(args.nproc, [*own_command("benchmark"), *words], args.device)
        device = select_device(args.device)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        with distributed.process_group(device):
            report = measure_workload(args.mode, _workload(args, device), show)
        if old is not None:
            show(f"\ncompared with {args.compare}:\n{compare(old, report)}")
    if args.json is not None and is_main:
        write_json(args.json, report, indent=1, allow_nan=False)
    return 1 if args.sweep is not None and failed else 0


def _workload(args: argparse.Namespace, device: torch.device) -> Workload:
    """The workload that the flags describe; rejects what would otherwise fail only after minutes."""
    from solov2.benchmarking.measure import Workload
    from solov2.build import build_compute
    from solov2.data.build import locate_data, require_data

    defaults = {"train.precision": "tf32", "train.batch_size": 1}
    named = given(args, {"precision": "train.precision", "batch_size": "train.batch_size"})
    config = load_config(args.model or DEFAULT_MODEL, defaults | parse_overrides(args.set) | named)
    height, width = args.size or (-(-edge // 32) * 32 for edge in reversed(config.model.input_scale))
    if min(height, width) < 64 or height % 32 or width % 32:
        raise InputError(f"--size must be two multiples of 32, at least 64, got {height} {width}")
    cells = sum(side**2 for side in config.model.grid_sizes)
    if args.candidates > cells:
        raise InputError(f"--candidates {args.candidates} is more than the {cells} grid cells of {config.name}")
    if args.data_root is not None:
        require_data(locate_data(config, args.data_root), splits=["train"])
    iterations, warmup = (3, 1) if device.type == "cpu" else (50, 20)
    return Workload(
        config,
        size=(height, width),
        compute=build_compute(config, device),
        batch_size=config.train.batch_size,
        instances=args.instances,
        candidates=args.candidates,
        iterations=args.iterations or iterations,
        warmup=warmup if args.warmup is None else args.warmup,
        data_root=args.data_root,
    )


def _sweep_commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """{value of the swept flag: command that measures it}, after validating every command."""
    import torch

    flag, *values = args.sweep
    if flag not in SWEEPS or not values:
        raise InputError(f"--sweep takes one of {', '.join(SWEEPS)} and its values, e.g. --sweep batch-size 1 2 4")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--sweep starts its own processes: leave out torchrun and give --nproc")
    if args.words.count("--sweep") != 1:
        raise InputError("--sweep must be given only once and be followed by a space")
    start = args.words.index("--sweep")
    words = args.words[:start] + args.words[start + 1 + len(args.sweep) :]
    swept = {value: [*words, f"--{flag}", *(value.split("x") if flag == "size" else [value])] for value in values}
    for arguments in swept.values():
        _workload(build_parser().parse_args(arguments), torch.device("cpu"))
    return {value: [sys.executable, *own_command("benchmark"), *arguments] for value, arguments in swept.items()}
