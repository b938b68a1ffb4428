"""benchmark.py: images per second of inference, training and data loading, stage by stage.

Images, ground truth and network outputs are synthetic and seeded, weights are random, so that nothing has to be
downloaded. A random network finds nothing; decoding therefore works on prepared outputs of the network's own shapes and
types that hold about `--candidates` candidates and ellipses as masks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

import solov2
from solov2.build import construct, default_class_names
from solov2.commands.errors import run_command
from solov2.commands.measure import Workload, measure_inference, measure_loading, measure_training
from solov2.config import InputError, load_config
from solov2.distributed import select_device
from solov2.engine import HALF_TYPES

DEFAULT_CONFIGS = ("solov2_r50_fpn_1x", "solov2_light_r50_fpn_3x")
INPUT_SIZES = {(1333, 800): (800, 1216), (768, 448): (448, 768)}  # by test scale; others: both edges, rounded up to 32


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    name = cpu_name()
    if device.type != "cpu":
        properties = getattr(torch.get_device_module(device), "get_device_properties", lambda _: None)(device)
        name = getattr(properties, "name", device.type)
    return {
        "device": str(device),
        "device_name": name,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "solov2": solov2.__version__,
        "commit": git_commit(),
    }


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the checkout that the package lies in, with "+" where files differ from it; None outside of one."""
    checkout = Path(solov2.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    try:
        answers = [
            subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0].stdout.strip() + ("+" if answers[1].stdout.strip() else "")


def format_stages(kind: str, part: dict[str, Any]) -> str:
    """The table of one mode ("inference" or "training")."""
    total = part["stages"]["total"]["median_ms"]
    lines = [f"  {kind:<18}{'median ms':>12}{'p90 ms':>12}{'share':>9}"]
    lines += [
        f"    {name:<16}{stage['median_ms']:>12.2f}{stage['p90_ms']:>12.2f}{stage['median_ms'] / total:>9.1%}"
        for name, stage in part["stages"].items()
    ]
    memory = "" if part["peak_memory_mib"] is None else f", peak memory {part['peak_memory_mib']:.0f} MiB"
    lines.append(
        f"    {part['images_per_second']:.2f} images/s, stages sum to {part['sum_of_stages_ms']:.2f} ms" + memory
    )
    if kind == "inference":
        lines.append(
            f"    decoded from synthetic outputs: {part['candidates_per_image']:.0f} candidates, "
            f"{part['instances_per_image']:.0f} instances per image"
        )
    else:
        lines.append(
            f"    {part['images_per_second_without_targets']:.2f} images/s without the targets, "
            "which loader workers assign"
        )
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of benchmark.py."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description="Measure images per second, stage by stage, "
        "on synthetic images with random weights; needs no data.",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        default=list(DEFAULT_CONFIGS),
        metavar="NAME",
        help=f"model names or YAML files (default: {' '.join(DEFAULT_CONFIGS)})",
    )
    parser.add_argument("--mode", choices=("infer", "train", "all"), default="all")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="network input in pixels, multiples of "
        "32 from 64 on (default: 800 1216 or 448 768, by the test scale of the model)",
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=tuple(HALF_TYPES), default="float32")
    parser.add_argument("--device", help="e.g. cpu (default: the accelerator, if there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument("--iterations", type=int, help="measured ones (default: 3 on a CPU, 50 elsewhere)")
    parser.add_argument("--warmup", type=int, help="unmeasured ones before them (default: 1 on a CPU, 20 elsewhere)")
    parser.add_argument("--instances", type=int, default=8, help="ellipses per image as ground truth in training")
    parser.add_argument(
        "--candidates",
        type=int,
        default=500,
        help="(cell, class) pairs per image prepared to pass "
        "the category threshold in inference; direct neighbours of one class suppress each other",
    )
    parser.add_argument("--data-root", metavar="DIR", help="also measure loading from this COCO tree")
    parser.add_argument("--json", metavar="FILE", help="write the report as one JSON object")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 failed, 2 a user's mistake, 130 interrupted)."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    _check(args)
    device = select_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    workloads = [_workload(name, args, device) for name in args.config]  # before any measuring: names may be wrong
    machine = environment(device)
    print(
        f"{machine['device_name']} ({machine['device']}), {machine['threads']} threads, torch {machine['torch']}, "
        f"torchvision {machine['torchvision']}, solov2 {machine['solov2']} (commit {machine['commit'] or 'unknown'})"
    )
    print(
        "synthetic images and masks, random weights; median and 90th percentile of "
        f"{workloads[0].iterations} iterations after {workloads[0].warmup}",
        flush=True,
    )
    reports = []
    for workload in workloads:
        try:
            reports.append(_report(workload, args.mode, args.data_root))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{workload.config.name} does not fit into memory; lower --batch-size or --size"
            ) from error
    if args.json is not None:
        content = {"environment": machine, "settings": vars(args), "reports": reports}
        Path(args.json).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what would only fail after minutes.

    Raises:
        InputError: a number out of range, or flags that exclude each other.
    """
    for name, least in (
        ("batch_size", 1),
        ("threads", 1),
        ("iterations", 1),
        ("warmup", 0),
        ("instances", 0),
        ("candidates", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.size is not None and (min(args.size) < 64 or any(side % 32 for side in args.size)):
        raise InputError(f"--size must be two multiples of 32, at least 64, got {args.size[0]} {args.size[1]}")
    if args.data_root is not None and args.mode == "infer":
        raise InputError("--data-root measures the loading of training data; use it with --mode train or all")
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise InputError(f"--json {args.json}: the folder does not exist")


def _workload(name: str, args: argparse.Namespace, device: torch.device) -> Workload:
    config = load_config(name)
    long, short = config.model.input_scale
    size = args.size or INPUT_SIZES.get((long, short), (-(-short // 32) * 32, -(-long // 32) * 32))
    cells = sum(side**2 for side in config.model.grid_sizes)
    if args.candidates > cells:
        raise InputError(f"--candidates {args.candidates} is more than the {cells} grid cells of {config.name}")
    on_cpu = device.type == "cpu"
    return Workload(
        config,
        tuple(size),
        device,
        args.batch_size,
        args.precision,
        warmup=(1 if on_cpu else 20) if args.warmup is None else args.warmup,
        iterations=(3 if on_cpu else 50) if args.iterations is None else args.iterations,
        instances=args.instances,
        candidates=args.candidates,
    )


def _report(workload: Workload, mode: str, data_root: str | None) -> dict[str, Any]:
    """Measure one configuration and print what is known as soon as it is."""
    model = workload.config.model
    with torch.device("meta"):
        parameters = sum(item.numel() for item in construct(model, default_class_names(model.num_classes)).parameters())
    report: dict[str, Any] = {
        "config": workload.config.name,
        "size": list(workload.size),
        "batch_size": workload.batch_size,
        "precision": workload.precision,
        "channels_last": workload.memory_format == torch.channels_last,
        "warmup": workload.warmup,
        "iterations": workload.iterations,
        "parameters": parameters,
        "synthetic": "images, ground truth and decoded network outputs are synthetic; weights are random",
    }
    print(
        f"{workload.config.name}: {workload.size[0]} x {workload.size[1]}, batch {workload.batch_size}, "
        f"{workload.precision}, {parameters / 1e6:.1f} M parameters",
        flush=True,
    )
    if data_root is not None:  # first, since files may be missing
        report["loading"] = measure_loading(workload, Path(data_root))
        print(f"  loading: {report['loading']['images_per_second_per_worker']:.2f} images/s per worker", flush=True)
    for flag, kind, function in (("infer", "inference", measure_inference), ("train", "training", measure_training)):
        if mode in ("all", flag):
            report[kind] = function(workload)
            print(format_stages(kind, report[kind]), flush=True)
    return report


if __name__ == "__main__":
    sys.exit(main())
