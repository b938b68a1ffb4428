"""Measuring a step: its time without a profiler, then the shares of its spans in a profiled pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, supported_activities

from solov2 import distributed
from solov2.benchmarking.flops import OUTSIDE, count_flops
from solov2.compute import SPAN, Compute, synchronize
from solov2.config import Config

MAX_PROFILED = 3  # iterations of the profiled pass
IDLE = "device idle"  # the row for the time in which an accelerator runs no kernel


@dataclass(frozen=True)
class Workload:
    """What to measure."""

    config: Config  # of the model and its training
    size: tuple[int, int]  # (height, width) of the network input in pixels
    compute: Compute
    batch_size: int  # images per step and process
    instances: int  # ground-truth ellipses per image
    candidates: int  # (cell, class) pairs per image for post-processing
    iterations: int  # timed iterations
    warmup: int  # iterations before them, after a first one whose operations are counted
    data_root: str | None = None  # a COCO tree; None generates shapes


def measure(step: Callable[[], object], workload: Workload) -> dict[str, Any]:
    """Count the operations of a step, warm up, time it and profile it; several processes do so at the same time.

    Returns:
        median_ms, p90_ms: time of an iteration, without a profiler and with a wait for the device after each; p90 is
        the nearest sample at or above the percentile. images_per_second: over all processes, from the median of the
        slowest. queued_images_per_second: the same with a single wait after the last iteration (on a CPU, which queues
        nothing, from the mean of the same iterations). peak_memory_mib: see `peak_memory`. iterations: number of timed
        iterations. profiled_iterations: number of profiled iterations. profiler_cost: mean time of a profiled / of a
        timed iteration. stages: {span, `OUTSIDE`, `IDLE` or "total": {"share": fraction of the profiled pass, "ms":
        that fraction of median_ms, "gflop": 1e9 operations per iteration}}.
    """
    device, iterations = workload.compute.device, workload.iterations
    operations = count_flops(step)
    for _ in range(workload.warmup):
        step()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    distributed.barrier()
    samples = sorted(seconds_of(step, device) for _ in range(iterations))
    mean, median = statistics.mean(samples), statistics.median(samples)
    queued = mean if device.type == "cpu" else seconds_of(step, device, iterations)
    memory, profiled = peak_memory(device), min(iterations, MAX_PROFILED)
    shares, profiled_mean = profiled_shares(step, device, profiled, median)
    operations["total"], shares["total"] = operations.total(), 1.0
    timings = distributed.all_gather_objects((median, queued))
    images = workload.batch_size * len(timings)
    return {
        "median_ms": 1000 * median,
        "p90_ms": 1000 * samples[min(iterations - 1, int(0.9 * iterations))],
        "images_per_second": images / max(seconds for seconds, _ in timings),
        "queued_images_per_second": images / max(seconds for _, seconds in timings),
        "peak_memory_mib": memory,
        "iterations": iterations,
        "profiled_iterations": profiled,
        "profiler_cost": profiled_mean / mean,
        "stages": {
            name: {"share": share, "ms": 1000 * share * median, "gflop": operations[name] / 1e9}
            for name, share in shares.items()
        },
    }


def seconds_of(step: Callable[[], object], device: torch.device, iterations: int = 1) -> float:
    """Mean seconds per iteration, with a single wait for the device after the last one."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(iterations):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / iterations


def profiled_shares(
    step: Callable[[], object], device: torch.device, iterations: int, median: float
) -> tuple[dict[str, float], float]:
    """Run `step` under torch's profiler.

    On a CPU, shares are fractions of the wall time of the profiled iterations. On an accelerator, whose kernels the
    profiler does not slow down, they are fractions of the unprofiled `median`, in seconds; time without a kernel is
    `IDLE`.

    Returns:
        ({row: share}, seconds per profiled iteration); the shares sum to 1.
    """
    on_cpu = device.type == "cpu"
    with torch.profiler.profile(activities={ProfilerActivity.CPU} if on_cpu else supported_activities()) as profiler:
        mean = seconds_of(step, device, iterations)
    times = {name: us / 1e6 / iterations for name, us in span_times(profiler.events(), on_device=not on_cpu).items()}
    rest = max(0.0, (mean if on_cpu else median) - sum(times.values()))
    times |= {OUTSIDE: rest} if on_cpu else {OUTSIDE: times.pop(OUTSIDE, 0.0), IDLE: rest}
    total = sum(times.values())
    return {name: seconds / total for name, seconds in times.items()}, mean


def span_times(events: Iterable[Any], *, on_device: bool) -> dict[str, float]:
    """Microseconds of each span, without the spans inside it, in the order of their starts.

    Args:
        events: torch's `FunctionEvent`s of a profile.
        on_device: instead of wall time, sum the time of the kernels launched while a span was the innermost one, by
            any thread (a backward pass has its own); kernels launched outside all spans count as `OUTSIDE`.
    """
    times: dict[str, float] = {}
    open_spans: list[tuple[str, float]] = []  # name, end
    on_host = (event for event in events if event.device_type == DeviceType.CPU)
    for event in sorted(on_host, key=lambda event: (event.time_range.start, -event.time_range.end)):
        while open_spans and open_spans[-1][1] <= event.time_range.start:
            open_spans.pop()
        outer = open_spans[-1][0] if open_spans else OUTSIDE
        if event.name.startswith(SPAN):
            name = event.name.removeprefix(SPAN)
            open_spans.append((name, event.time_range.end))
            times[name] = times.get(name, 0.0) + (0.0 if on_device else event.time_range.elapsed_us())
            if outer != OUTSIDE and not on_device:
                times[outer] -= event.time_range.elapsed_us()
        elif on_device and not event.is_user_annotation:  # the device time of an annotation is that of everything in it
            times[outer] = times.get(outer, 0.0) + event.self_device_time_total
    return times


def peak_memory(device: torch.device) -> float | None:
    """Peak memory in MiB: on an accelerator, of tensors since the last reset; on a CPU, resident since process start.

    None on a CPU if the system does not report it (/proc/self/status, Linux).
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
