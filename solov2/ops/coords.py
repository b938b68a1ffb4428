"""Coordinate channels (paper section 2.1.1, CoordConv)."""

from __future__ import annotations

import torch
from torch import Tensor


def coordinate_channels(height: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normalized pixel coordinates of a feature map, [1, 2, H, W]: x, then y, both from -1 to 1 inclusive.

    Computed in float32 and then cast, as in the reference, so that float64 runs agree with it.
    """
    x = _positions(width, device).expand(height, width)
    y = _positions(height, device)[:, None].expand(height, width)
    return torch.stack([x, y])[None].to(dtype)


def _positions(count: int, device: torch.device) -> Tensor:
    """`torch.linspace(-1, 1, count)`, float32 [count].

    A graph compiled with linspace is valid for one count only, so compiled graphs compute the same from both ends to
    the middle. As linspace does on CPUs with AVX2 or AVX-512, they round once, after the sum; elsewhere the last bit
    may differ.
    """
    if not torch.compiler.is_dynamo_compiling():
        return torch.linspace(-1, 1, count, device=device)
    return arithmetic_positions(count, device)


def arithmetic_positions(count: int, device: torch.device) -> Tensor:
    """What `torch.linspace(-1, 1, count)` computes, in operations that a compiler needs not specialize."""
    wide = torch.float32 if device.type == "mps" else torch.float64  # which mps lacks
    step = torch.full((), 2.0, device=device) / max(count - 1, 1)
    index = torch.arange(count, dtype=wide, device=device)
    below = (torch.minimum(index, count - 1 - index) * step.to(wide) - 1).float()
    return torch.where(index < max(count // 2, 1), below, -below)
