"""The peak convolution throughput of the machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from solov2.benchmarking.measure import seconds_of
from solov2.compute import HALF_TYPES, Compute

CONVOLUTIONS = ((3, 256, 256), (3, 64, 64), (1, 256, 1024))  # (kernel, input, output channels): heads and FPN, backbone
CONVOLUTION_SIZE = (48, 72)  # height, width of their inputs
MIN_SECONDS = 0.15  # how long each convolution is repeated
MIN_REPEATS = 3
QUEUED_CALLS = 20  # calls per sample on an accelerator: a single call would include the launch latency


@torch.no_grad()
def convolution_peak(compute: Compute) -> dict[str, Any]:
    """The highest throughput of plain convolutions like the network's, as a roof for the throughput of its stages.

    Args:
        compute: device and precision; with batch size 1 on a CPU, 16 elsewhere.

    Returns:
        gflop_per_second: of the best convolution. convolution: its name. precision. convolutions: {name: GFLOP/s} of
        all of them. A multiply-add counts as two operations.
    """
    device, precision = compute.device, compute.precision
    dtype, batch = HALF_TYPES[precision] or torch.float32, 1 if device.type == "cpu" else 16
    layouts = {", channels last": torch.channels_last}
    if dtype == torch.float32:  # in half precision it took half a minute per product on a CPU without AVX-512
        layouts[""] = torch.contiguous_format
    rates = {}
    for kernel, channels, outputs in CONVOLUTIONS:
        for layout, memory_format in layouts.items():
            x, weight = (
                torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)
                for shape in ((batch, channels, *CONVOLUTION_SIZE), (outputs, channels, kernel, kernel))
            )
            with compute.arithmetic():
                seconds = _min_seconds(functools.partial(F.conv2d, x, weight, padding=kernel // 2), device)
            operations = 2 * x.numel() * weight[:, 0].numel()
            name = f"{kernel}x{kernel} {channels}->{outputs} on {batch} x {x.shape[2]} x {x.shape[3]}{layout}"
            rates[name] = operations / seconds / 1e9
    best = max(rates, key=rates.__getitem__)
    return {"gflop_per_second": rates[best], "convolution": best, "precision": precision, "convolutions": rates}


def _min_seconds(function: Callable[[], object], device: torch.device) -> float:
    samples: list[float] = []
    calls = 1 if device.type == "cpu" else QUEUED_CALLS
    function()  # selects and prepares the kernel
    while len(samples) < MIN_REPEATS or sum(samples) * calls < MIN_SECONDS:
        samples.append(seconds_of(function, device, calls))
    return min(samples)
