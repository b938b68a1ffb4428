"""The unified mask feature branch (Wang et al. 2020, section 2.1.2 and figure 5)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solov2.models.layers import ConvNormReLU
from solov2.ops.coords import coordinate_channels


class MaskFeatureHead(nn.Module):
    """P2..P5 -> one feature map at stride 4, to which every dynamic kernel is applied.

    P2 passes through one step of 3x3 convolution, norm and ReLU; P3, P4 and P5 through one, two and three steps, each
    followed by bilinear 2x upsampling. The four results are summed, and a 1x1 step turns the sum into the features,
    which are never negative because of its ReLU.

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
        conv_norm_relu = functools.partial(ConvNormReLU, norm=norm, deformable=deformable, modulated=modulated)
        self.levels = nn.ModuleList()
        for i in range(4):
            first = in_channels + (2 if i == 3 else 0)
            self.levels.append(
                nn.ModuleList(
                    conv_norm_relu(hidden_channels if j else first, hidden_channels) for j in range(max(1, i))
                )
            )
        self.predictor = conv_norm_relu(hidden_channels, out_channels, kernel_size=1)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """[P2, P3, P4, P5] -> mask features [B, E, H / 4, W / 4]."""
        p2, p3, p4, p5 = pyramid  # [B, D, H / s, W / s], s = 4, 8, 16, 32
        # Kernels depend on position, so the features must too (section 3.1.2); coordinates enter at the coarsest level.
        coordinates = coordinate_channels(*p5.shape[-2:], dtype=p5.dtype, device=p5.device)  # [1, 2, H / 32, W / 32]
        p5 = torch.cat([p5, coordinates.expand(p5.shape[0], -1, -1, -1)], dim=1)  # [B, D + 2, H / 32, W / 32]

        (step,) = self.levels[0].children()
        fused = step(p2)  # [B, M, H / 4, W / 4]
        for i, x in enumerate((p3, p4, p5), 1):
            for step in self.levels[i].children():
                x = F.interpolate(step(x), scale_factor=2, mode="bilinear", align_corners=False)  # [B, M, 2 h, 2 w]
            fused = fused + x  # [B, M, H / 4, W / 4]
        return self.predictor(fused)  # [B, E, H / 4, W / 4]
