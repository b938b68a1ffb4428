"""Convolutions of a map together with its coordinate channels (Wang et al. 2020, section 3.1.2; CoordConv)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solov2.models.layers import DeformConv2d

# (convolution, maps, weight in place of the convolution's own or None) -> as many maps
ConvolveMaps = Callable[[nn.Module, Sequence[Tensor], "Tensor | None"], list[Tensor]]


def convolve_each(conv: nn.Module, maps: Sequence[Tensor], weight: Tensor | None = None) -> list[Tensor]:
    """Apply one convolution to every map, list of [B, D, H, W] -> list of [B, D', H, W]; `weight` replaces its own."""
    if weight is None:
        return [conv(x) for x in maps]
    assert isinstance(conv, nn.Conv2d)
    return [conv._conv_forward(x, weight, conv.bias) for x in maps]


def convolve_with_coordinates(
    conv: nn.Module, maps: Sequence[Tensor], coordinates: Sequence[Tensor], convolve: ConvolveMaps = convolve_each
) -> list[Tensor]:
    """conv(cat([map, coordinates])) for every map, up to rounding.

    A convolution is linear, so the two parts of its weight are applied apart: that of the coordinates gives one map for
    all images of the batch, which is added. Nothing is copied, and accelerators multiply the 256 channels of the maps
    faster than 258. Deformable convolutions also choose where to sample by the coordinates, and get both together.

    Args:
        conv: `nn.Conv2d` or `DeformConv2d` with D + 2 input channels.
        maps: [B, D, H, W] each.
        coordinates: [1, 2, H, W] each.
        convolve: applies one convolution to all maps.

    Returns:
        [B, D', H, W] each.
    """
    if isinstance(conv, DeformConv2d):
        together = [
            torch.cat([x, c.expand(x.shape[0], -1, -1, -1)], dim=1) for x, c in zip(maps, coordinates, strict=True)
        ]
        return convolve(conv, together, None)
    assert isinstance(conv, nn.Conv2d)
    kind, layout = maps[0].device.type, torch.contiguous_format
    if maps[0].is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else conv.weight.dtype
    parts = conv.weight.split([maps[0].shape[1], 2], dim=1)
    weight, position_weight = (part.to(dtype=dtype, memory_format=layout) for part in parts)  # once for all maps
    convolved = convolve(conv, maps, weight)  # [B, D', H, W]
    added = [F.conv2d(c, position_weight, padding=conv.padding) for c in coordinates]  # [1, D', H, W]
    return [x + c for x, c in zip(convolved, added, strict=True)]
