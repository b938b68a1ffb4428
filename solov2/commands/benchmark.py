"""benchmark.py: images per second of inference, training, data, post-processing and evaluation, stage by stage.

Images, ground truth and network outputs are synthetic and seeded, weights are random, so that nothing has to be
downloaded. A random network finds nothing; decoding therefore works on prepared outputs of the network's own shapes and
types that hold about `--candidates` candidates and ellipses as masks.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from solov2 import distributed
from solov2.benchmarking.compare import compare, read_report
from solov2.benchmarking.machine import convolution_peak
from solov2.benchmarking.measure import BenchmarkSettings
from solov2.benchmarking.suite import MODES, make_workload, measure_workload
from solov2.benchmarking.sweep import SWEEPS, points, run_sweep
from solov2.benchmarking.tables import format_machine, format_peak, format_sweep
from solov2.commands.arguments import add_shared_arguments
from solov2.commands.exit import own_command, run_command
from solov2.compute import select_device
from solov2.errors import InputError
from solov2.outputs import check_output, write_json
from solov2.training.environment import environment

DEFAULT_CONFIGS = ("solov2_r50_fpn_1x", "solov2_light_r50_fpn_3x")
MINIMA = {  # smallest value of each number
    "batch_size": 1,
    "threads": 1,
    "iterations": 1,
    "warmup": 0,
    "instances": 0,
    "candidates": 0,
    "images": 1,
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of benchmark.py."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description="Measure images per second, stage by stage, "
        "on synthetic images with random weights; needs no data.",
        epilog="several processes train together: torchrun --nproc-per-node 8 benchmark.py, or benchmark.py --nproc 8",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        default=list(DEFAULT_CONFIGS),
        metavar="NAME",
        help=f"model names or YAML files (default: {' '.join(DEFAULT_CONFIGS)})",
    )
    parser.add_argument(
        "--mode",
        choices=(*MODES, "all"),
        default="all",
        help="infer: photograph to masks, plain and model.optimize(); train: one optimiser step; data: files to "
        "batches with targets; nms: Matrix NMS and post-processing alone; eval: results to run lengths and AP",
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar=("WHAT", "VALUE"),
        help=f"measure at several values, each in a fresh process: {', '.join(SWEEPS)} (sizes as HxW)",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar=("OLD.json", "NEW.json"),
        help="then print the ratios to an earlier report; with two reports, compare them and measure nothing",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="network input in pixels, multiples of "
        "32 from 64 on (default: 800 1216 or 448 768, by the test scale of the model)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument(
        "--iterations", type=int, help="measured ones (default: 3 on a CPU, 50 elsewhere; data and nms: at least 20)"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        help="unmeasured ones before them (default: 2 on a CPU, 20 elsewhere; data and nms: at least 5); two always "
        "run, to count operations and memory",
    )
    parser.add_argument("--instances", type=int, default=8, help="ellipses per image as ground truth")
    parser.add_argument(
        "--candidates",
        type=int,
        default=500,
        help="(cell, class) pairs per image prepared to pass the category threshold in inference, where direct "
        "neighbors of one class suppress each other; masks given to Matrix NMS in --mode nms",
    )
    parser.add_argument("--images", type=int, default=20, help="images of 100 results each in --mode eval")
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="load from this COCO tree instead of generated shapes; --mode train loads too",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as one JSON object")
    notes = {"--precision": "default: float32", "--batch-size": "default: 1"}
    add_shared_arguments(parser, "--nproc", "--device", "--precision", "--batch-size", "--overwrite", notes=notes)
    parser.set_defaults(batch_size=1, precision="float32")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> BenchmarkSettings:
    """The part of the command line that says what to measure."""
    return BenchmarkSettings(
        **{entry.name: getattr(args, entry.name) for entry in dataclasses.fields(BenchmarkSettings)}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 failed, 2 a user's mistake, 130 interrupted)."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    _check(args)
    old = None
    if args.compare is not None:
        old, *new = [read_report(path) for path in args.compare]
        if new:
            print(compare(old, new[0]))
            return 0
    _check_workloads(settings_of(args))
    if args.nproc is not None:
        distributed.relaunch(args.nproc, [*own_command("benchmark"), *distributed.without_nproc(argv)], args.device)
    device = select_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with distributed.process_group(device):
        content = _measure(settings_of(args), device, _say if distributed.is_main() else _say_nothing)
        if distributed.is_main():
            if args.json is not None:
                write_json(args.json, content, indent=1, allow_nan=False)
            if old is not None:
                print(f"compared with {args.compare[0]}:\n{compare(old, content)}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _say_nothing(text: str) -> None:
    pass


def _measure(settings: BenchmarkSettings, device: torch.device, show: Callable[[str], None]) -> dict[str, Any]:
    """Everything that was asked for; the content of the JSON file."""
    content: dict[str, Any] = {"environment": environment(device), "settings": dataclasses.asdict(settings)}
    show(format_machine(content["environment"]))
    show("synthetic images and masks, random weights; median and 90th percentile of (measured after unmeasured) steps")
    peak = None
    if settings.mode not in ("data", "eval"):  # which multiply nothing
        content["peak"] = peak = convolution_peak(device, settings.precision)
        show(format_peak(peak))
    if settings.sweep is not None:
        rows, reports = run_sweep(settings, peak, show)
        show(format_sweep(settings.sweep[0], rows))
        return {**content, "sweep": rows, "reports": reports}
    workloads = [make_workload(name, settings, device) for name in settings.config]
    return {**content, "reports": [measure_workload(workload, settings, peak, show) for workload in workloads]}


def _check(args: argparse.Namespace) -> None:
    """Refuse what would only fail after minutes.

    Raises:
        InputError: a number out of range, or flags that exclude each other.
    """
    _check_numbers(settings_of(args))
    if args.data_root is not None and args.mode not in ("data", "train", "all"):
        raise InputError("--data-root measures the loading of training data; use it with --mode data, train or all")
    if args.compare is not None and len(args.compare) > 2:
        raise InputError(f"--compare takes one or two reports, got {len(args.compare)}")
    check_output(args.json, "--json", overwrite=args.overwrite)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.nproc is not None:
        distributed.launched_processes(args.nproc)
        processes = args.nproc
    if processes > 1 and args.mode not in ("train", "all"):
        raise InputError(f"several processes measure the training step only; use --mode train, not {args.mode}")
    if processes > 1 and args.sweep is not None:
        raise InputError("--sweep measures one process; leave out --nproc and torchrun")
    if processes > 1 and args.data_root is not None:
        raise InputError("--data-root measures one process; leave out --nproc and torchrun")


def _check_numbers(settings: BenchmarkSettings) -> None:
    for name, least in MINIMA.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if settings.size is not None and (min(settings.size) < 64 or any(side % 32 for side in settings.size)):
        raise InputError(f"--size must be two multiples of 32, at least 64, got {settings.size[0]} {settings.size[1]}")


def _check_workloads(settings: BenchmarkSettings) -> None:
    """Every configuration at every value of a sweep, before anything is measured: names and numbers may be wrong."""
    every = [settings] if settings.sweep is None else [each for _, each in points(settings)]
    for each in every:
        _check_numbers(each)
        for name in settings.config:
            make_workload(name, each, torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
