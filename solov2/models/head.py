"""The SOLOv2 head: category logits and a mask kernel per grid cell (Wang et al. 2020, section 2.1.1, figure 2b)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solov2.models.coordinates import ConvolveMaps, convolve_each, convolve_with_coordinates
from solov2.models.layers import ConvNormReLU
from solov2.ops.coords import coordinate_channels


class SOLOv2Head(nn.Module):
    """P2..P6 -> category logits and a dynamic kernel per grid cell; all levels share the weights.

    Shape letters: B images, D pyramid channels, T tower channels, C classes, E values per kernel, S grid cells per side
    of a level.

    Args:
        in_channels: D.
        tower_channels, tower_depth: T, and the number of 3x3 convolutions in each of the two towers.
        num_classes: C, foreground classes only.
        kernel_channels: E, values of one dynamic 1x1 kernel, which has no bias.
        grid_sizes: S of each of the five levels.
        norm: "group" (reference) or "batch".
        deformable_convs: number of deformable convolutions at the end of each tower.
        modulated: DCNv2 if true, DCNv1 if false.
    """

    # `solov2.models.optimize.use_winograd` replaces it with a faster function that computes the same.
    convolve: ConvolveMaps = staticmethod(convolve_each)

    def __init__(
        self,
        in_channels: int,
        *,
        tower_channels: int,
        tower_depth: int,
        num_classes: int,
        kernel_channels: int,
        grid_sizes: Sequence[int],
        norm: str = "group",
        deformable_convs: int = 0,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        self.grid_sizes = tuple(grid_sizes)

        def tower(first_channels: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    ConvNormReLU(
                        tower_channels if i else first_channels,
                        tower_channels,
                        norm=norm,
                        deformable=i >= tower_depth - deformable_convs,
                        modulated=modulated,
                    )
                    for i in range(tower_depth)
                )
            )

        self.category_tower = tower(in_channels)
        self.kernel_tower = tower(in_channels + 2)
        self.category_predictor = nn.Conv2d(tower_channels, num_classes, 3, padding=1)
        self.kernel_predictor = nn.Conv2d(tower_channels, kernel_channels, 3, padding=1)
        # Every class starts with probability 0.01.
        for conv, initial_bias in ((self.category_predictor, -math.log(99)), (self.kernel_predictor, 0.0)):
            weight, bias = conv.parameters()
            nn.init.normal_(weight, std=0.01)
            nn.init.constant_(bias, initial_bias)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[P2..P6] -> (category logits: list of [B, C, S, S], kernels: list of [B, E, S, S])."""
        levels = resample_outer_levels(pyramid)  # five of [B, D, H / s, W / s], s = 8, 8, 16, 32, 32
        grids = [resize(x, (S, S)) for x, S in zip(levels, self.grid_sizes, strict=True)]  # [B, D, S, S]
        # Equal objects in two places share their class but not their mask: only kernels see coordinates (3.1.2).
        coordinates = [grid_coordinates(x, S) for x, S in zip(levels, self.grid_sizes)]  # [1, 2, S, S]

        features = apply_tower(self.category_tower, grids, self.convolve)  # [B, T, S, S]
        category_logits = self.convolve(self.category_predictor, features, None)  # [B, C, S, S]
        features = apply_tower(self.kernel_tower, grids, self.convolve, coordinates)  # [B, T, S, S]
        kernels = self.convolve(self.kernel_predictor, features, None)  # [B, E, S, S]
        return category_logits, kernels


def resample_outer_levels(pyramid: Sequence[Tensor]) -> list[Tensor]:
    """Halve P2 and enlarge P6 to the size of P5, as in the authors' code; the paper does not mention it."""
    p2, p3, p4, p5, p6 = pyramid  # [B, D, H / s, W / s], s = 4, 8, 16, 32, 64
    p2 = F.interpolate(p2, scale_factor=0.5, mode="bilinear", align_corners=False)  # [B, D, H / 8, W / 8]
    p6 = resize(p6, p5.shape[-2:])  # [B, D, H / 32, W / 32]
    return [p2, p3, p4, p5, p6]


def grid_coordinates(level: Tensor, size: int) -> Tensor:
    """Coordinate channels (x, then y) of a level [B, D, H, W], resized to its grid: [1, 2, S, S].

    The reference appends them to the level and resizes both together; resizing works per channel, so this gives the
    same result without the copy.
    """
    coordinates = coordinate_channels(*level.shape[-2:], dtype=level.dtype, device=level.device)  # [1, 2, H, W]
    return resize(coordinates, (size, size))  # [1, 2, S, S]


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize without aligned corners or antialiasing: [B, D, H, W] -> [B, D, *size]."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def apply_tower(
    tower: nn.Sequential,
    levels: Sequence[Tensor],
    convolve: ConvolveMaps = convolve_each,
    coordinates: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Apply a tower of `ConvNormReLU` steps to every level: list of [B, D, S, S] -> list of [B, T, S, S].

    `coordinates`, [1, 2, S, S] per level, are further channels of the first step's input, if there are any.
    Group norm works per level, as in the reference. In training, batch norm computes its statistics over the cells of
    all levels together: per-level statistics would leave running statistics that match none of the levels.
    """
    for step in tower:
        assert isinstance(step, ConvNormReLU)
        if coordinates:
            maps = convolve_with_coordinates(step.conv, levels, coordinates, convolve)  # [B, T, S, S]
            coordinates = ()
        else:
            maps = convolve(step.conv, levels, None)  # [B, T, S, S]
        if isinstance(step.norm, nn.BatchNorm2d) and step.norm.training:
            cells = torch.cat([x.flatten(2) for x in maps], dim=2)  # [B, T, cells of all levels]
            cells = step.norm_relu(cells[..., None])[..., 0]  # [B, T, cells of all levels]
            parts = cells.split([x.shape[-2] * x.shape[-1] for x in maps], dim=2)  # [B, T, S * S]
            levels = [part.unflatten(2, x.shape[-2:]) for part, x in zip(parts, maps)]  # [B, T, S, S]
        else:
            levels = [step.norm_relu(x) for x in maps]  # [B, T, S, S]
    return list(levels)
