"""Floating-point operations of a step, stage by stage, and their rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d  # noqa: F401  (its import registers torch.ops.torchvision)

Lap = Callable[[str], None]


def count_flops(step: Callable[[Lap], None]) -> dict[str, int]:
    """Run `step`; the operations of its convolutions and matrix products (two per multiplication and addition).

    Everything else (norms, activations, resizing, loss sums) is not counted. Deformable convolutions count as plain
    ones of their size. Source: torch.utils.flop_counter.

    Returns:
        {stage: operations} in the order of the laps, stages without any included.
    """
    mapping = {
        torch.ops.torchvision.deform_conv2d: _deformable_forward,
        torch.ops.torchvision._deform_conv2d_backward: _deformable_backward,
    }
    counted: dict[str, int] = {}

    def lap(stage: str) -> None:
        counted[stage] = counted.get(stage, 0) + counter.get_total_flops() - sum(counted.values())

    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step(lap)
    return counted


def _deformable_forward(
    input_shape: Sequence[int], weight_shape: Sequence[int], *_others: Any, out_shape: Sequence[int], **_more: Any
) -> int:
    return 2 * math.prod(weight_shape) * out_shape[0] * math.prod(out_shape[2:])


def _deformable_backward(
    grad_shape: Sequence[int], input_shape: Sequence[int], weight_shape: Sequence[int], *_others: Any, **_more: Any
) -> int:
    """Gradients of the input and of the weight, each of the size of the forward pass."""
    return 2 * _deformable_forward(input_shape, weight_shape, out_shape=grad_shape)


def add_rates(stages: dict[str, dict[str, Any]], operations: dict[str, int]) -> None:
    """Write gflop and gflop_per_second into the stages and into `total`; None where nothing is counted."""
    operations = {**operations, "total": sum(operations.values())}
    for name, stage in stages.items():
        gflop = operations.get(name, 0) / 1e9
        stage["gflop"] = gflop or None
        stage["gflop_per_second"] = 1000 * gflop / stage["median_ms"] if gflop else None


def add_shares(part: dict[str, Any], peak: dict[str, Any] | None) -> None:
    """Write share_of_peak into the stages of a measured part; None where there is no rate or no peak."""
    for stage in part["stages"].values():
        rate = stage["gflop_per_second"]
        stage["share_of_peak"] = None if peak is None or rate is None else rate / peak["gflop_per_second"]
