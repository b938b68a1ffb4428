"""Feature pyramid network (Lin et al. 2017) as SOLOv2 uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """C2..C5 -> P2..P6: lateral 1x1, nearest top-down path, output 3x3, all with bias and without norm.

    P6 is P5 subsampled by 2. Weights start Xavier uniform, biases zero.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(n, channels, 1) for n in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for conv in [*self.lateral, *self.output]:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[C2..C5] -> [P2..P6], each [B, channels, H / stride, W / stride] with strides 4, 8, 16, 32, 64."""
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[-2:], mode="nearest")
        pyramid = [output(level) for output, level in zip(self.output, levels, strict=True)]
        return [*pyramid, pyramid[-1][..., ::2, ::2]]
