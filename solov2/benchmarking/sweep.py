"""How time and memory grow with the work: the same measurement at several values, each in a fresh process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import torch

from solov2.benchmarking.measure import BenchmarkSettings
from solov2.benchmarking.suite import make_workload, measure_workload, modes_of
from solov2.compute import select_device
from solov2.errors import InputError

SWEEPS = {  # what is swept -> the modes that depend on it
    "batch": ("infer", "train", "data", "nms"),
    "size": ("infer", "train", "nms"),
    "candidates": ("infer", "nms"),
    "instances": ("train", "eval"),
}
DEFAULT_MODES = {"batch": ("infer", "train"), "size": ("infer", "train")}  # of --mode all, where not all of the above


def parse_values(over: str, values: list[str]) -> list[Any]:
    """Values of a sweep: positive integers, and sizes as HxW or one side of a square.

    Raises:
        InputError: a value of another form, or none at all.
    """
    if over not in SWEEPS:
        raise InputError(f"--sweep must start with one of {', '.join(SWEEPS)}, got '{over}'")
    if not values:
        raise InputError(f"--sweep {over} needs values, for example: --sweep {over} {_example(over)}")
    try:
        if over != "size":
            return [int(value) for value in values]
        sides = [[int(side) for side in value.split("x")] for value in values]
    except ValueError as error:
        raise InputError(f"--sweep {over} takes values like {_example(over)}, got {' '.join(values)}") from error
    if any(len(pair) > 2 for pair in sides):
        raise InputError(f"--sweep size takes values like {_example(over)}, got {' '.join(values)}")
    return [(pair[0], pair[-1]) for pair in sides]


def _example(over: str) -> str:
    return {"batch": "1 2 4", "size": "448x768 800x1216", "candidates": "100 500 2000", "instances": "1 8 64"}[over]


def point(settings: BenchmarkSettings, over: str, value: Any, mode: str) -> BenchmarkSettings:
    """The settings of one value."""
    key = "batch_size" if over == "batch" else over
    changes: dict[str, Any] = {key: list(value) if over == "size" else value, "mode": mode}
    return replace(settings, **changes)


def points(settings: BenchmarkSettings) -> list[tuple[Any, BenchmarkSettings]]:
    """(value, settings) of every measurement of the sweep, mode after mode.

    Raises:
        InputError: a value of the wrong form, or a mode that does not depend on what is swept.
    """
    assert settings.sweep is not None
    over, *words = settings.sweep
    values = parse_values(over, words)
    modes = DEFAULT_MODES.get(over, SWEEPS[over]) if settings.mode == "all" else modes_of(settings.mode)
    if not set(modes) <= set(SWEEPS[over]):
        raise InputError(f"--sweep {over} changes nothing in --mode {settings.mode}; use {' or '.join(SWEEPS[over])}")
    return [(value, point(settings, over, value, mode)) for mode in modes for value in values]


def run_sweep(
    settings: BenchmarkSettings, peak: dict[str, Any] | None, show: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure every configuration at every value.

    Returns:
        (rows, reports): rows of the table in the order it prints (config, part, over, value, ms, images_per_second,
        ms_per_unit, peak_memory_mib, step_memory_mib, error), and the whole reports behind them.
    """
    assert settings.sweep is not None
    over = settings.sweep[0]
    rows: list[dict[str, Any]] = []
    reports = []
    for name in settings.config:
        for value, each in points(settings):
            label = f"{value[0]}x{value[1]}" if over == "size" else value
            show(f"{name}, {each.mode}, {over} {label} …")
            report, error = measure_apart(name, each, peak)
            if report is None:
                rows.append({"config": name, "part": each.mode, "over": over, "value": label, "error": error})
                continue
            reports.append(report)
            rows += [
                {"config": report["config"], "part": part, "over": over, "value": label, "error": None, **figures}
                for part, figures in _figures(report, over)
            ]
    order = list(dict.fromkeys((row["config"], row["part"]) for row in rows))
    return sorted(rows, key=lambda row: order.index((row["config"], row["part"]))), reports


def _figures(report: dict[str, Any], over: str) -> list[tuple[str, dict[str, Any]]]:
    """(part, its row) of every part of a report."""
    figures = []
    for name, part in report.items():
        if not isinstance(part, dict) or "stages" not in part:
            continue
        images = {"evaluation": part.get("images"), "nms_coco_classes": 1, "nms_one_class": 1}.get(
            name, report["batch_size"]
        )
        height, width = report["size"]
        each = {"batch": 1, "size": height * width / 1e6}.get(over)
        units = images * (report[over] if each is None else each)
        milliseconds = part["stages"]["total"]["median_ms"]
        row = {
            "ms": milliseconds,
            "images_per_second": part["images_per_second"],
            "ms_per_unit": milliseconds / units if units else None,
            "peak_memory_mib": part["peak_memory_mib"],
            "step_memory_mib": part["step_memory_mib"],
        }
        figures.append((name, row))
    return figures


def measure_apart(
    name: str, settings: BenchmarkSettings, peak: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, str | None]:
    """Measure one configuration in a fresh process, whose memory no earlier point has touched.

    Returns:
        (report, None), or (None, the reason) where it does not fit into memory.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        try:
            return executor.submit(_measure_here, name, settings, peak).result(), None
        except InputError as error:
            return None, str(error)
        except BrokenProcessPool:
            return None, "the system ended the process, most likely for want of memory"


def _measure_here(name: str, settings: BenchmarkSettings, peak: dict[str, Any] | None) -> dict[str, Any]:
    device = select_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return measure_workload(make_workload(name, settings, device), settings, peak, lambda _: None)
