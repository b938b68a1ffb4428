"""How a step is measured: its time without a profiler, then the shares of its spans in a profiled pass."""

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

PROFILED = 3  # iterations of the profiled pass, at most
IDLE = "device idle"  # the row of an accelerator's time without a kernel


@dataclass(frozen=True)
class Workload:
    """What is measured."""

    config: Config  # the model, and the recipe of its training
    size: tuple[int, int]  # (height, width) of the network input in pixels
    compute: Compute
    batch_size: int  # images per step and process
    instances: int  # ellipses per image as ground truth
    candidates: int  # (cell, class) pairs per image that post-processing gets
    iterations: int  # timed ones
    warmup: int  # those before them, after a first one whose operations are counted
    data_root: str | None = None  # a COCO tree; None generates shapes


def measure(step: Callable[[], object], workload: Workload) -> dict[str, Any]:
    """Count the operations of a step, warm up, time it, profile it; where several processes run, all at once.

    Returns:
        median_ms, p90_ms: of the iterations, each of which waits for the device, timed without a profiler; the nearest
        sample at or above the percentile. images_per_second: of all processes, by the median of the slowest;
        queued_images_per_second: the same with one wait, behind the last iteration (on a CPU, which queues nothing, by
        the mean of the same iterations). peak_memory_mib: see `peak_memory`. iterations: timed ones.
        profiled_iterations, profiler_cost: those of the profiled pass, and their mean time / that of the timed ones.
        stages: {span, `OUTSIDE`, `IDLE` or "total": {"share": of the profiled pass, "ms": that share of median_ms,
        "gflop": 1e9 operations}}, per iteration.
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
    memory, profiled = peak_memory(device), min(iterations, PROFILED)
    shares, profiled_mean = profiled_shares(step, device, profiled, median)
    operations["total"], shares["total"] = operations.total(), 1.0
    every = distributed.all_gather_objects((median, queued))
    images = workload.batch_size * len(every)
    return {
        "median_ms": 1000 * median,
        "p90_ms": 1000 * samples[min(iterations - 1, int(0.9 * iterations))],
        "images_per_second": images / max(own for own, _ in every),
        "queued_images_per_second": images / max(own for _, own in every),
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
    """Mean seconds of iterations with one wait for the device, behind the last."""
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

    On a CPU a share is one of the wall time of the profiled iterations. On an accelerator, whose kernels the profiler
    does not slow down, it is one of the unprofiled `median`, in seconds; what no kernel fills is `IDLE`.

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
    """Microseconds of each span without the spans inside it, in the order in which they start.

    Args:
        events: torch's `FunctionEvent`s of a profile.
        on_device: instead of wall time, the time of the kernels that were launched while a span was the innermost one,
            by whatever thread (a backward pass has its own); `OUTSIDE` has those that were launched outside of all.
    """
    times: dict[str, float] = {}
    around: list[tuple[str, float]] = []  # spans that are open: name, end
    on_host = (event for event in events if event.device_type == DeviceType.CPU)
    for event in sorted(on_host, key=lambda event: (event.time_range.start, -event.time_range.end)):
        while around and around[-1][1] <= event.time_range.start:
            around.pop()
        outer = around[-1][0] if around else OUTSIDE
        if event.name.startswith(SPAN):
            name = event.name.removeprefix(SPAN)
            around.append((name, event.time_range.end))
            times[name] = times.get(name, 0.0) + (0.0 if on_device else event.time_range.elapsed_us())
            if outer != OUTSIDE and not on_device:
                times[outer] -= event.time_range.elapsed_us()
        elif on_device and not event.is_user_annotation:  # the "kernel" of an annotation is all that ran during it
            times[outer] = times.get(outer, 0.0) + event.self_device_time_total
    return times


def peak_memory(device: torch.device) -> float | None:
    """MiB: tensors on an accelerator since its peak was reset; on a CPU resident memory since the process started.

    None where the system does not say (/proc/self/status, Linux).
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
