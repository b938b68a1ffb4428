"""The SOLOv2 head: category branch and kernel branch on S x S grids (paper section 3.2, figure 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solov2.models.layers import ConvNormReLU
from solov2.models.winograd import on_every_level
from solov2.ops.coords import coordinate_channels


class SOLOv2Head(nn.Module):
    """P2..P6 -> category logits and dynamic kernels of every grid cell; weights are shared between the levels.

    Args:
        in_channels: of the pyramid.
        tower_channels, tower_depth: width and number of 3x3 steps of each of the two towers.
        num_classes: C, foreground classes only.
        kernel_channels: E, the numbers of one dynamic 1x1 kernel (it has no bias).
        grid_sizes: S of each of the five levels.
        norm: "group" (reference) or "batch".
        deformable_convs: how many convolutions of each tower are deformable, counted from its end.
        modulated: DCNv2 if true, DCNv1 if false.
    """

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
        for conv in (self.category_predictor, self.kernel_predictor):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.constant_(self.category_predictor.bias, -math.log(99))  # every class starts at probability 0.01

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[P2..P6] -> (category logits: list of [B, C, S, S], kernels: list of [B, E, S, S])."""
        p2, p3, p4, p5, p6 = pyramid
        p2 = F.interpolate(p2, scale_factor=0.5, mode="bilinear", align_corners=False)
        p6 = F.interpolate(p6, size=p5.shape[-2:], mode="bilinear", align_corners=False)
        grids, grids_with_coordinates = [], []
        for feature, size in zip((p2, p3, p4, p5, p6), self.grid_sizes, strict=True):
            grid, coordinates = self._to_grid(feature, size)
            grids.append(grid)
            grids_with_coordinates.append(torch.cat([grid, coordinates], dim=1))
        category_logits = on_every_level(self.category_predictor, apply_tower(self.category_tower, grids))
        kernels = on_every_level(self.kernel_predictor, apply_tower(self.kernel_tower, grids_with_coordinates))
        return category_logits, kernels

    @staticmethod
    def _to_grid(feature: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Feature map and its coordinates, both resized to S x S: [B, C, S, S] and [B, 2, S, S].

        The reference resizes their concatenation; the resize works per channel, so this is the same without the copy.
        """
        coordinates = coordinate_channels(*feature.shape[-2:], dtype=feature.dtype, device=feature.device)
        grid, coordinates = (
            F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False) for x in (feature, coordinates)
        )
        return grid, coordinates.expand(grid.shape[0], -1, -1, -1)


def apply_tower(tower: nn.Sequential, levels: Sequence[Tensor]) -> list[Tensor]:
    """A tower of `ConvNormReLU` steps on every level: list of [B, C, S, S] -> list of [B, C', S, S].

    Batch norm in training takes its statistics over the cells of all levels together: one per level would leave running
    statistics that belong to none of them. Group norm works per level, as in the reference.
    """
    for step in tower:
        maps = on_every_level(step.conv, levels)
        if isinstance(step.norm, nn.BatchNorm2d) and step.norm.training:
            cells = torch.cat([x.flatten(2) for x in maps], dim=2)  # [B, C', cells of all levels]
            cells = step.relu(step.norm(cells[..., None]))[..., 0]
            parts = cells.split([x.shape[-2] * x.shape[-1] for x in maps], dim=2)
            levels = [part.unflatten(2, x.shape[-2:]) for part, x in zip(parts, maps)]
        else:
            levels = [step.relu(step.norm(x)) for x in maps]
    return list(levels)
