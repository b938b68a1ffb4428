"""The convolution peak of the machine, and memory in use."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from solov2.compute import HALF_TYPES, synchronize

CONVOLUTIONS = ((3, 256, 256), (3, 64, 64), (1, 256, 1024))  # (kernel, input, output channels): heads and FPN, backbone
CONVOLUTION_SIZE = (48, 72)  # height, width of their maps
MIN_SECONDS = 0.15  # that each of them is repeated for
MIN_REPEATS = 3
QUEUED_CALLS = 20  # of an accelerator: a call of its own would count the time to reach it
CLEAR_PEAK = "5"  # resets VmHWM when written to clear_refs; Linux, Documentation/filesystems/proc.rst


@torch.no_grad()
def convolution_peak(device: torch.device, precision: str) -> dict[str, Any]:
    """The most that plain convolutions of the network's kind reach here: the roof that stages are measured against.

    Args:
        device: batch 1 on a CPU, 16 elsewhere.
        precision: "float32", "bf16" or "fp16".

    Returns:
        gflop_per_second of the best, its name in `convolution`, and all of them in `convolutions`. A multiplication and
        an addition count as two operations.
    """
    dtype, batch = HALF_TYPES[precision] or torch.float32, 1 if device.type == "cpu" else 16
    layouts = {", channels last": torch.channels_last}
    if dtype == torch.float32:  # in half types this layout took half a minute per product on a CPU without AVX-512
        layouts[""] = torch.contiguous_format
    rates = {}
    for kernel, channels, outputs in CONVOLUTIONS:
        for layout, memory_format in layouts.items():
            x, weight = (
                torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)
                for shape in ((batch, channels, *CONVOLUTION_SIZE), (outputs, channels, kernel, kernel))
            )
            seconds = _fastest(functools.partial(F.conv2d, x, weight, padding=kernel // 2), device)
            operations = 2 * x.numel() * weight[:, 0].numel()
            name = f"{kernel}x{kernel} {channels}->{outputs} on {batch} x {x.shape[2]} x {x.shape[3]}{layout}"
            rates[name] = operations / seconds / 1e9
    best = max(rates, key=rates.__getitem__)
    return {"gflop_per_second": rates[best], "convolution": best, "precision": precision, "convolutions": rates}


def _fastest(function: Callable[[], Any], device: torch.device) -> float:
    samples: list[float] = []
    calls = 1 if device.type == "cpu" else QUEUED_CALLS
    function()  # picks and prepares its kernel
    synchronize(device)
    while len(samples) < MIN_REPEATS or sum(samples) * calls < MIN_SECONDS:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        samples.append((time.perf_counter() - start) / calls)
    return min(samples)


def added_memory(function: Callable[[], Any], device: torch.device) -> float | None:
    """Run `function`; the most memory that it held above what was held before, in MiB.

    On an accelerator: memory of tensors. On a CPU: resident memory of the process, after free memory has gone back to
    the system; None where the system does not let a process reset its peak (/proc/self/clear_refs, Linux only).
    """
    gc.collect()
    if device.type != "cpu":
        synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        held = torch.accelerator.memory_allocated(device)
        function()
        synchronize(device)
        return (torch.accelerator.max_memory_allocated(device) - held) / 2**20
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="utf-8")
    except OSError:
        function()
        return None
    before = _process_memory("VmRSS")
    function()
    after = _process_memory("VmHWM")
    return None if before is None or after is None else after - before


def peak_memory(device: torch.device) -> float | None:
    """MiB: tensors on an accelerator since the last reset, else resident memory of the process; None where unknown."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**20
    peak = _process_memory("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _process_memory(key: str) -> float | None:
    """VmRSS (resident now) or VmHWM (its peak) of this process in MiB; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)


def _return_free_memory() -> None:
    """Else memory that an earlier step has freed would be used again and not be seen as added."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc
    except (OSError, AttributeError, TypeError):
        pass
