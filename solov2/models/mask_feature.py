"""The unified mask feature branch (Wang et al. 2020, section 2.1.2 and figure 5)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solov2.models.coordinates import convolve_with_coordinates
from solov2.models.layers import ConvNormReLU, recomputed
from solov2.ops.coords import coordinate_channels


class MaskFeatureHead(nn.Module):
    """P2..P5 -> one feature map at stride 4, to which every dynamic kernel is applied.

    P2 passes through one step of 3x3 convolution, norm and ReLU; P3, P4 and P5 through one, two and three steps, each
    followed by bilinear 2x upsampling. The four results are summed, and a 1x1 step turns the sum into the features,
    which are never negative because of its ReLU. Upsampling is linear, so P3, P4 and P5 are summed before the last one.

    Shape letters: B images, D pyramid channels, M hidden channels, E mask feature channels.

    Args:
        in_channels, hidden_channels, out_channels: D, M, E.
        norm: "group" (reference) or "batch".
        deformable: make all convolutions deformable, including the 1x1.
        modulated: DCNv2 if true, DCNv1 if false.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        norm: str = "group",
        deformable: bool = False,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        self.recompute = False  # keep only the pyramid for backward passes, which compute the rest again
        conv_norm_relu = functools.partial(ConvNormReLU, norm=norm, deformable=deformable, modulated=modulated)
        self.levels = make_levels(conv_norm_relu, (*[in_channels] * 3, in_channels + 2), hidden_channels)
        self.predictor = conv_norm_relu(hidden_channels, out_channels, kernel_size=1)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """[P2, P3, P4, P5] -> mask features [B, E, H / 4, W / 4]."""
        return recomputed(self._forward, *pyramid) if self.recompute else self._forward(*pyramid)

    def _forward(self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor) -> Tensor:
        """The same for four levels [B, D, H / s, W / s], s = 4, 8, 16, 32."""
        # Kernels depend on position, so the features must too (section 3.1.2); coordinates enter at the coarsest level.
        coordinates = coordinate_channels(*p5.shape[-2:], dtype=p5.dtype, device=p5.device)  # [1, 2, H / 32, W / 32]
        first5: Any = next(self.levels[3].children())
        (x5,) = convolve_with_coordinates(first5.conv, [p5], [coordinates])  # [B, M, H / 32, W / 32]
        return self.predictor(
            fuse_levels(self.levels, p2, p3, p4, first5.relu(first5.norm(x5)))
        )  # [B, E, H / 4, W / 4]


def make_levels(
    step: Callable[[int, int], nn.Module], in_channels: Sequence[int], hidden_channels: int
) -> nn.ModuleList:
    """The steps of P2..P5: one, one, two and three.

    Args:
        step: (channels in, channels out) -> a step.
        in_channels: of the first step of each level.
        hidden_channels: M, the channels of all results.
    """
    return nn.ModuleList(
        nn.ModuleList(step(hidden_channels if j else first, hidden_channels) for j in range(max(1, i)))
        for i, first in enumerate(in_channels)
    )


def fuse_levels(levels: nn.ModuleList, p2: Tensor, p3: Tensor, p4: Tensor, x5: Tensor) -> Tensor:
    """The sum of the four levels: [B, M, H / 4, W / 4].

    Args:
        levels: from `make_levels`.
        p2, p3, p4: the levels [B, D, H / s, W / s], s = 4, 8, 16.
        x5: what the first step made of P5, [B, M, H / 32, W / 32].
    """
    (first2,), (first3,), (first4, second4), (_, second5, third5) = ([*steps.children()] for steps in levels)
    x5 = upsample_twice(second5(upsample_twice(x5)))  # [B, M, H / 8, W / 8]
    x4 = upsample_twice(first4(p4))  # [B, M, H / 8, W / 8]
    coarse = first3(p3) + second4(x4) + third5(x5)  # [B, M, H / 8, W / 8]
    return first2(p2) + upsample_twice(coarse)  # [B, M, H / 4, W / 4]


def upsample_twice(x: Tensor) -> Tensor:
    """Bilinear 2x upsampling without aligned corners: [B, M, h, w] -> [B, M, 2 h, 2 w]."""
    if x.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        # torch decomposes it into about 60 kernels there, since its own backward pass adds in arbitrary order.
        return double_axis(double_axis(x.to(torch.promote_types(x.dtype, torch.float32)), 2), 3).to(x.dtype)
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def double_axis(x: Tensor, axis: int) -> Tensor:
    """Upsample one axis of x 2x: new pixels are 1/4 of one neighbor and 3/4 of the other; borders are repeated."""
    length = x.shape[axis]
    before = torch.cat((x.narrow(axis, 0, 1), x.narrow(axis, 0, length - 1)), axis)
    after = torch.cat((x.narrow(axis, 1, length - 1), x.narrow(axis, length - 1, 1)), axis)
    return torch.stack((x.lerp(before, 0.25), x.lerp(after, 0.25)), axis + 1).flatten(axis, axis + 1)
