"""Coordinate channels (paper section 2.1.1, CoordConv)."""

from __future__ import annotations

import torch
from torch import Tensor


def coordinate_channels(height: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normalized pixel coordinates of a feature map, [1, 2, H, W]: x, then y, both from -1 to 1 inclusive.

    Computed in float32 and then cast, as in the reference, so that float64 runs agree with it.
    """
    x = torch.linspace(-1, 1, width, dtype=torch.float32, device=device).expand(height, width)
    y = torch.linspace(-1, 1, height, dtype=torch.float32, device=device)[:, None].expand(height, width)
    return torch.stack([x, y])[None].to(dtype)
