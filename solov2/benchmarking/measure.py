"""How the benchmark times a step: stage by stage, with its operations and its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from solov2 import distributed
from solov2.benchmarking.machine import added_memory, peak_memory
from solov2.benchmarking.roofline import Lap, add_rates, count_flops
from solov2.compute import Compute, synchronize
from solov2.config import Config

PERCENTILE = 0.9
SEED = 0


@dataclass(frozen=True)
class BenchmarkSettings:
    """What a benchmark was asked for; None stands for a default that depends on model or device."""

    config: list[str]  # model names or YAML files
    mode: str = "all"
    sweep: list[str] | None = None  # what to vary, then its values
    size: list[int] | None = None  # (height, width) of the network input in pixels
    batch_size: int = 1
    precision: str = "float32"
    device: str | None = None
    threads: int | None = None
    iterations: int | None = None
    warmup: int | None = None
    instances: int = 8  # ellipses per image as ground truth
    candidates: int = 500  # (cell, class) pairs per image above the category threshold
    images: int = 20  # of the evaluation
    data_root: str | None = None  # a COCO tree; None generates shapes


@dataclass(frozen=True)
class Workload:
    """What is measured: a model configuration, input (height, width) in pixels, and how often."""

    config: Config
    size: tuple[int, int]
    compute: Compute
    batch_size: int
    warmup: int
    iterations: int
    instances: int
    candidates: int


class Stopwatch:
    """Seconds of named stages and of their `total`. With `split` every stage waits for the device, so that it pays for
    its own work; without, only the total is taken.
    """

    def __init__(self, device: torch.device, *, split: bool) -> None:
        self.device, self.split = device, split
        self.samples: dict[str, list[float]] = {}

    def start(self) -> None:
        """Begin an iteration."""
        self._current: dict[str, float] = {}
        self._begin = self._last = self._now()

    def lap(self, stage: str) -> None:
        """End a stage; a stage may come several times in an iteration."""
        if self.split:
            now = self._now()
            self._current[stage] = self._current.get(stage, 0.0) + now - self._last
            self._last = now

    def finish(self) -> None:
        """End the iteration."""
        self._current["total"] = self._now() - self._begin
        for stage, seconds in self._current.items():
            self.samples.setdefault(stage, []).append(seconds)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def measure(step: Callable[[Lap], None], workload: Workload) -> dict[str, Any]:
    """Time `step` stage by stage and, on an accelerator, in turn with that as a whole without the waits in between.

    Where several processes run, all of them measure at once and the slowest decides.

    Returns:
        stages: {name: {median_ms, p90_ms, gflop, gflop_per_second}} of this process with `total` last, operations None
        where a stage has none; sum_of_stages_ms; warmup and iterations; processes, slowest_process_ms (its median
        total) and images_per_second of all processes together; peak_memory_mib (of the device; on a CPU the resident
        memory of the process) and step_memory_mib (what a step adds to it, see `added_memory`).
    """
    operations, step_memory = warm_up(step, workload)
    on_cpu = workload.compute.device.type == "cpu"
    watches = [Stopwatch(workload.compute.device, split=split) for split in ((True,) if on_cpu else (True, False))]
    distributed.barrier()
    for _ in range(workload.iterations):
        for watch in watches:
            watch.start()
            step(watch.lap)
            watch.finish()
    stages = {name: milliseconds(samples) for name, samples in (watches[0].samples | watches[-1].samples).items()}
    add_rates(stages, operations)
    total = stages["total"]["median_ms"]
    slowest = max(distributed.all_gather_objects(total))
    return {
        "stages": stages,
        "sum_of_stages_ms": sum(stage["median_ms"] for stage in stages.values()) - total,
        "warmup": unmeasured(workload),
        "iterations": workload.iterations,
        "processes": distributed.world_size(),
        "slowest_process_ms": slowest,
        "images_per_second": 1000 * workload.batch_size * distributed.world_size() / slowest,
        "peak_memory_mib": peak_memory(workload.compute.device),
        "step_memory_mib": step_memory,
    }


def warm_up(step: Callable[[Lap], None], workload: Workload) -> tuple[dict[str, int], float | None]:
    """The iterations that are not timed: operations are counted in the first, memory in the last.

    Returns:
        ({stage: operations}, MiB that a step adds or None).
    """
    operations: dict[str, int] = {}
    runs: list[Callable[[], Any]] = [lambda: operations.update(count_flops(step))]
    runs += [lambda: step(lambda _: None)] * (unmeasured(workload) - 1)
    for run in runs[:-1]:
        run()
    return operations, added_memory(runs[-1], workload.compute.device)


def unmeasured(workload: Workload) -> int:
    """Iterations before those that are timed; at least two, since counting operations takes memory of its own."""
    return max(2, workload.warmup)


def milliseconds(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and 90th percentile (the nearest sample at or above it)."""
    ordered = sorted(seconds)
    rank = min(len(ordered) - 1, int(PERCENTILE * len(ordered)))
    return {"median_ms": 1000 * statistics.median(ordered), "p90_ms": 1000 * ordered[rank]}
