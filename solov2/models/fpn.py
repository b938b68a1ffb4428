"""Feature pyramid network (Lin et al. 2017) as SOLOv2 uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """C2..C5 -> P2..P6: 1x1 lateral convolutions, nearest-neighbor top-down path, 3x3 output convolutions.

    The convolutions have a bias and neither norm nor activation. Initialization: Xavier uniform weights, zero biases.

    Args:
        in_channels: channels of C2..C5.
        channels: D, channels of every pyramid level.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(n, channels, 1) for n in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for conv in [*self.lateral, *self.output]:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[C2..C5] -> [P2..P6], each [B, D, H / s, W / s] with strides s = 4, 8, 16, 32, 64 (P6 rounded up)."""
        levels = [lateral(c) for lateral, c in zip(self.lateral, features, strict=True)]  # [B, D, H / s, W / s]
        for i in range(len(levels) - 1, 0, -1):  # top-down, from C5 to C2
            coarse = F.interpolate(levels[i], size=levels[i - 1].shape[-2:], mode="nearest")  # [B, D, 2 h, 2 w]
            levels[i - 1] = levels[i - 1] + coarse  # [B, D, 2 h, 2 w]
        pyramid = [output(level) for output, level in zip(self.output, levels, strict=True)]  # [B, D, H / s, W / s]
        p6 = F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)  # [B, D, H / 64, W / 64]
        return [*pyramid, p6]
