"""The semantic branch: the head of Panoptic FPN (Kirillov et al. 2019, arXiv 1901.02446)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor, nn

from solov2.models.layers import ConvNormReLU, recomputed
from solov2.models.mask_feature import fuse_levels, make_levels


class SemanticHead(nn.Module):
    """P2..P5 -> logits of the stuff classes, and of "any thing", at stride 4.

    The levels are fused as those of the mask feature branch (Wang et al. 2020, figure 3b, calls the two analogous), but
    without coordinates, since what a pixel shows does not depend on where it is. A 1x1 convolution turns the sum into
    logits. Convolutions are plain also where those of the rest are deformable.

    Shape letters: B images, D pyramid channels, M hidden channels, S stuff classes.

    Args:
        in_channels, hidden_channels: D, M.
        num_stuff: S. Channel s of the logits is stuff label s, channel S stands for all things; of an auxiliary head,
            channel s is class s and channel S the background.
        norm: "group" (reference) or "batch".
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_stuff: int, *, norm: str = "group") -> None:
        super().__init__()
        self.recompute = False  # keep only the pyramid for backward passes, which compute the rest again
        self.levels = make_levels(functools.partial(ConvNormReLU, norm=norm), [in_channels] * 4, hidden_channels)
        self.predictor = nn.Conv2d(hidden_channels, num_stuff + 1, kernel_size=1)
        for module in self.levels.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """[P2, P3, P4, P5] -> logits [B, S + 1, H / 4, W / 4]."""
        return recomputed(self._forward, *pyramid) if self.recompute else self._forward(*pyramid)

    def _forward(self, p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor) -> Tensor:
        """The same for four levels [B, D, H / s, W / s], s = 4, 8, 16, 32."""
        (first5, *_) = self.levels[3].children()
        return self.predictor(fuse_levels(self.levels, p2, p3, p4, first5(p5)))  # [B, S + 1, H / 4, W / 4]
