"""The unified mask feature (paper section 3.2, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solov2.models.layers import ConvNormReLU
from solov2.ops.coords import coordinate_channels


class MaskFeatureHead(nn.Module):
    """P2..P5 -> one map at stride 4 that every dynamic kernel is applied to.

    Level i of the pyramid passes max(1, i) steps of conv 3x3, norm, ReLU, each but P2's followed by bilinear x2; the
    four results are summed and a 1x1 step makes the features, which are therefore never negative. P5 alone sees
    coordinates.
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
        kind = {"norm": norm, "deformable": deformable, "modulated": modulated}
        self.levels = nn.ModuleList()
        for i in range(4):
            first = in_channels + (2 if i == 3 else 0)
            self.levels.append(
                nn.ModuleList(
                    ConvNormReLU(hidden_channels if j else first, hidden_channels, **kind) for j in range(max(1, i))
                )
            )
        self.predictor = ConvNormReLU(hidden_channels, out_channels, kernel_size=1, **kind)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """[P2, P3, P4, P5] -> mask features [B, E, H / 4, W / 4]."""
        fused = self.levels[0][0](pyramid[0])
        for i in (1, 2, 3):
            x = pyramid[i]
            if i == 3:
                coordinates = coordinate_channels(*x.shape[-2:], dtype=x.dtype, device=x.device)
                x = torch.cat([x, coordinates.expand(x.shape[0], -1, -1, -1)], dim=1)
            for step in self.levels[i]:
                x = F.interpolate(step(x), scale_factor=2, mode="bilinear", align_corners=False)
            fused = fused + x
        return self.predictor(fused)
