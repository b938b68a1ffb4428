"""Floating-point operations of a step, by span."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper
from torchvision.ops import deform_conv2d  # noqa: F401  (its import registers torch.ops.torchvision)

from solov2.compute import SPAN

OUTSIDE = "outside the spans"


def count_flops(step: Callable[[], object]) -> Counter[str]:
    """Run `step` and count the operations of its convolutions and matrix products (two per multiply-add).

    Everything else (norms, activations, resizing, loss sums) is not counted. Deformable convolutions count as plain
    ones of the same size. Source: torch.utils.flop_counter.

    Returns:
        {span: operations}, counted in the innermost span around them, or in `OUTSIDE`.
    """
    # Spans are dispatched as operations only while a profiler runs.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), _SpanFlops() as counter:
        step()
    return counter.counts


class _SpanFlops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._stack = [OUTSIDE]
        self._formulas = flop_registry | {name: shape_wrapper(formula) for name, formula in FORMULAS.items()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.profiler._record_function_enter_new.default:
            self._stack.append(args[0].removeprefix(SPAN) if args[0].startswith(SPAN) else self._stack[-1])
        elif function is torch.ops.profiler._record_function_exit._RecordFunction:
            self._stack.pop()
        elif (formula := self._formulas.get(function.overloadpacket)) is not None:
            self.counts[self._stack[-1]] += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _convolution_flops(weight: torch.Size, output: torch.Size) -> int:
    return 2 * math.prod(weight) * output[0] * math.prod(output[2:])


def _second_is_weight(_input: Any, weight: torch.Size, *_others: Any, out_shape: torch.Size, **_more: Any) -> int:
    return _convolution_flops(weight, out_shape)


def _third_is_weight(_one: Any, _two: Any, weight: torch.Size, *_others: Any, out_shape: torch.Size) -> int:
    return _convolution_flops(weight, out_shape)


# What torch.utils.flop_counter does not know: {operation: (shapes of its arguments, out_shape) -> operations}.
FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.torchvision.deform_conv2d: _second_is_weight,
    torch.ops.torchvision._deform_conv2d_backward: (
        lambda grad, _input, weight, *_others, out_shape: 2 * _convolution_flops(weight, grad)
    ),  # twice, for the gradients of input and weight
    torch.ops.mkldnn._convolution_pointwise: _second_is_weight,
    torch.ops.mkldnn._convolution_pointwise_: _third_is_weight,  # adds to its first argument
    torch.ops.aten.cudnn_convolution_relu: _second_is_weight,
    torch.ops.aten.cudnn_convolution_add_relu: _second_is_weight,
    torch.ops.aten._int_mm: lambda left, _right, out_shape: 2 * left[1] * math.prod(out_shape),
}
