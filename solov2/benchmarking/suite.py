"""One configuration through the modes of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from solov2 import distributed
from solov2.benchmarking.measure import BenchmarkSettings, Workload
from solov2.benchmarking.measure_data import measure_loading
from solov2.benchmarking.measure_network import measure_inference, measure_training
from solov2.benchmarking.measure_results import measure_evaluation, measure_nms
from solov2.benchmarking.roofline import add_shares
from solov2.benchmarking.tables import format_part, format_workload
from solov2.build import build_compute, construct
from solov2.config import load_config, override_config
from solov2.data.categories import default_class_names
from solov2.errors import InputError

MODES = ("infer", "train", "data", "nms", "eval")
INPUT_SIZES = {(1333, 800): (800, 1216), (768, 448): (448, 768)}  # by test scale; others: both edges, rounded up to 32
SHORT_ITERATIONS = (5, 20)  # (warmup, measured) of steps that take milliseconds even on a CPU

Parts = dict[str, dict[str, Any]]


def modes_of(mode: str) -> tuple[str, ...]:
    """The modes that --mode stands for; several processes only train."""
    if mode != "all":
        return (mode,)
    return ("train",) if distributed.world_size() > 1 else MODES


def make_workload(name: str, settings: BenchmarkSettings, device: torch.device) -> Workload:
    """What is asked for of one configuration.

    Raises:
        InputError: an unknown or broken configuration, or more candidates than it has cells.
    """
    config = load_config(name)
    long, short = config.model.input_scale
    height, width = settings.size or INPUT_SIZES.get((long, short), (-(-short // 32) * 32, -(-long // 32) * 32))
    cells = sum(side**2 for side in config.model.grid_sizes)
    if settings.candidates > cells:
        raise InputError(f"--candidates {settings.candidates} is more than the {cells} grid cells of {config.name}")
    on_cpu = device.type == "cpu"
    config = override_config(config, {"train.precision": settings.precision})
    return Workload(
        config,
        (height, width),
        build_compute(config, device),
        settings.batch_size,
        warmup=(2 if on_cpu else 20) if settings.warmup is None else settings.warmup,
        iterations=(3 if on_cpu else 50) if settings.iterations is None else settings.iterations,
        instances=settings.instances,
        candidates=settings.candidates,
    )


def measure_workload(
    workload: Workload, settings: BenchmarkSettings, peak: dict[str, Any] | None, show: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the modes of one configuration and show each table as soon as it is known.

    Args:
        workload: the configuration and its input.
        settings: mode, data_root, images, iterations, warmup.
        peak: of `convolution_peak`; None leaves the shares of it out.
        show: called with text for people.

    Returns:
        The report: what was measured on, and one entry per measured part.

    Raises:
        InputError: it does not fit into memory, or data are missing.
    """
    report = describe(workload)
    show(format_workload(report))
    for mode in ordered(modes_of(settings.mode), settings):
        for name, part in _measure_mode(mode, workload, settings).items():
            add_shares(part, peak)
            report[name] = part
            show(format_part(name, part))
    return report


def ordered(modes: tuple[str, ...], settings: BenchmarkSettings) -> list[str]:
    """Loading first where files are named, since they may be missing; --mode train with --data-root loads too."""
    return ["data", *(mode for mode in modes if mode != "data")] if settings.data_root is not None else list(modes)


def describe(workload: Workload) -> dict[str, Any]:
    """What a report was measured on."""
    model = workload.config.model
    with torch.device("meta"):
        parameters = sum(item.numel() for item in construct(model, default_class_names(model.num_classes)).parameters())
    return {
        "config": workload.config.name,
        "size": list(workload.size),
        "batch_size": workload.batch_size,
        "precision": workload.compute.precision,
        "candidates": workload.candidates,
        "instances": workload.instances,
        "channels_last": workload.compute.memory_format == torch.channels_last,
        "warmup": workload.warmup,
        "iterations": workload.iterations,
        "parameters": parameters,
        "synthetic": "images, ground truth and decoded network outputs are synthetic; weights are random",
    }


def _measure_mode(mode: str, workload: Workload, settings: BenchmarkSettings) -> Parts:
    warmup, iterations = SHORT_ITERATIONS
    short = replace(
        workload,
        warmup=max(workload.warmup, warmup) if settings.warmup is None else settings.warmup,
        iterations=max(workload.iterations, iterations) if settings.iterations is None else settings.iterations,
    )
    measures: dict[str, Callable[[], Parts]] = {
        "infer": lambda: measure_inference(workload),
        "train": lambda: measure_training(workload),
        "data": lambda: measure_loading(short, None if settings.data_root is None else Path(settings.data_root)),
        "nms": lambda: measure_nms(short),
        "eval": lambda: measure_evaluation(workload, settings.images),
    }
    try:
        return measures[mode]()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise InputError(f"{workload.config.name} does not fit into memory; lower --batch-size or --size") from error
