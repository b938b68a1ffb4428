"""The label of every pixel: as two full interpolations and argmax, in tiles, without channels that cannot win."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from solov2.ops import label_map as module
from solov2.ops.label_map import contenders, label_map, label_tiles
from tests.helpers.operations import Waits

SIZES = [((96, 128), (90, 125), (200, 300)), ((64, 64), (64, 64), (64, 64)), ((128, 96), (128, 70), (31, 17))]


def two_steps(logits: torch.Tensor, size: tuple[int, int], original_size: tuple[int, int]) -> torch.Tensor:
    """The logits at the original size, [C, H, W]."""
    padded = F.interpolate(logits[None], scale_factor=4, mode="bilinear")[..., : size[0], : size[1]]
    return F.interpolate(padded, original_size, mode="bilinear")[0]


def smooth(channels: int, padded: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of regions, so that in most tiles most channels cannot win."""
    generator = torch.Generator().manual_seed(0)
    coarse = 5 * torch.randn(1, channels, 4, 5, generator=generator, dtype=dtype)
    return F.interpolate(coarse, (padded[0] // 4, padded[1] // 4), mode="bicubic")[0]


@pytest.mark.parametrize(("padded", "size", "original_size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_are_those_of_two_interpolations(
    padded: tuple[int, int], size: tuple[int, int], original_size: tuple[int, int], dtype: torch.dtype
) -> None:
    logits = smooth(20, padded, dtype)
    values = two_steps(logits, size, original_size)
    best = values.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4
    assert clear.float().mean() > 0.99
    labels = label_map(logits, size, original_size)
    assert labels.dtype == torch.uint8 and labels.shape == original_size
    assert torch.equal(labels[clear], values.argmax(0)[clear].byte())
    for tile, prune in (((7, 5), True), ((7, 5), False), ((1000, 1000), False)):
        assert torch.equal(label_tiles(logits, size, original_size, tile, prune=prune)[clear], labels[clear])


def test_the_lowest_of_equal_channels_wins() -> None:
    logits = smooth(5, (64, 64))
    doubled = torch.cat([logits[:2] - 100, logits, logits])  # each of the last five has a twin
    labels = label_map(doubled, (64, 64), (50, 60))
    assert torch.equal(labels, label_map(logits, (64, 64), (50, 60)) + 2)
    assert not label_map(torch.zeros(4, 16, 16), (64, 64), (50, 60)).any()


def test_channels_that_cannot_win_are_left_out() -> None:
    logits = torch.zeros(5, 3, 3)
    logits[1], logits[2, 1, 1], logits[3, 0, 0] = 2, 2, 3  # 2 equals the strongest at one place, 3 exceeds it at one
    assert contenders(logits).tolist() == [1, 2, 3]


def test_few_channels_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles of a picture of regions."""
    widths = []
    monkeypatch.setattr(
        module, "contenders", lambda logits: widths.append(len(contenders(logits))) or contenders(logits)
    )
    label_map(smooth(54, (256, 320)), (256, 320), (480, 640))
    assert len(widths) == 15 * 10 and max(widths) < 54 and sum(widths) < 0.4 * 54 * len(widths)


def test_an_accelerator_is_not_waited_for() -> None:
    with Waits() as waits:
        label_tiles(torch.randn(6, 16, 16), (64, 60), (100, 120), (40, 120), prune=False)
    assert waits.waits == []
