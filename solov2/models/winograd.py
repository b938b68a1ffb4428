"""3x3 convolutions with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3), for CPUs.

Every 6x6 window of the input is transformed, multiplied with the transformed weight and transformed back into 4x4
outputs: 36 multiplications where the plain convolution takes 144. Both gradients are products of the same kind. Source:
Lavin and Gray 2016 (arXiv 1509.09308). Rounding in float32 is about four times that of the plain convolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE = 4  # outputs per tile and axis
WINDOW = TILE + 2  # inputs per tile and axis
# Points at which the polynomials of the transform are evaluated; these keep its rounding errors small.
POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2), math.inf)
MIN_CHANNELS = 64  # below, the transforms cost more than the multiplications they save
MIN_TILES = 12  # with fewer, reading the transformed weights does
MIN_TRAINED_TILES = 96  # the same in training, which transforms weights and their gradients in every step
VALUES_AT_ONCE = 2**21  # of the transformed input: they stay in the processor's cache
VALUES_PER_GRADIENT = 2**22  # the same in the weight gradient, where each piece is added to 36 C O numbers


class WinogradConv2d(nn.Conv2d):
    """`nn.Conv2d` (3x3, stride 1, padding 1) with the same parameters that computes by F(4x4, 3x3).

    Unless `prepare` was called it does so in float32 training only, so that evaluation rounds as the plain convolution
    does. Maps too small to gain take the plain convolution, too. Results are channels last.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device)
        self.register_buffer("prepared", None, persistent=False)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> WinogradConv2d:
        """The same convolution, with the very parameters of `conv`."""
        own = cls(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta")
        own.weight, own.bias = conv.weight, conv.bias
        return own.train(conv.training)

    @staticmethod
    def pays_for(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether a module is a convolution of this kind, and wide enough."""
        if not isinstance(conv, nn.Conv2d):
            return False
        kind = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        wide = min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
        return kind == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and wide

    def prepare(self) -> None:
        """Transform the weight permanently, for a network that is not trained any more."""
        self.prepared = transform_weight(self.weight.detach().double()).to(self.weight.dtype)

    def on_levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Several maps [B, C, H, W] in one product: list of [B, O, H, W]."""
        return self._convolve(maps, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve([x], weight, bias)[0]

    def _convolve(self, maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        tiles = sum(len(x) * math.prod(tile_counts(*x.shape[2:])) for x in maps)
        if self.prepared is not None:
            if tiles >= MIN_TILES:
                return convolve(maps, self.prepared, bias)
        elif self.training and tiles >= MIN_TRAINED_TILES and not torch.is_autocast_enabled(weight.device.type):
            return list(Convolution.apply(weight, bias, *maps))
        return [super(WinogradConv2d, self)._conv_forward(x, weight, bias) for x in maps]


class Convolution(torch.autograd.Function):
    """(weight [O, C, 3, 3], bias [O] or None, maps [B, C, H, W]...) -> as many maps [B, O, H, W]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        """`convolve` with the weight as it is."""
        ctx.save_for_backward(weight, *maps)
        return tuple(convolve(maps, transform_weight(weight), bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of weight, bias and maps, each where it is needed."""
        weight, *maps = ctx.saved_tensors
        needs_weight, needs_bias, *needs_maps = ctx.needs_input_grad
        of_weight = weight_gradient(maps, gradients) if needs_weight else None
        sums = (gradient.sum((0, 2, 3)) for gradient in gradients)
        of_bias = functools.reduce(torch.add, sums) if needs_bias else None
        of_maps: Sequence[Tensor | None] = [None] * len(maps)
        if any(needs_maps):  # the convolution with the weight turned by 180 degrees
            of_maps = convolve(gradients, transform_weight(weight.flip(2, 3).transpose(0, 1)), None)
        return of_weight, of_bias, *of_maps


def on_every_level(conv: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """A convolution of several maps [B, C, H, W], in one product where it can: list of [B, O, H, W]."""
    return conv.on_levels(maps) if isinstance(conv, WinogradConv2d) else [conv(x) for x in maps]


def convolve(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Maps [B, C, H, W] by a transformed weight [36, C, O] plus bias [O]: maps [B, O, H, W], channels last."""
    to_input, to_output = matrix("input", maps[0]), matrix("output", maps[0])
    channels, out_channels = weight.shape[1:]
    results, tiled = [], []
    for x in maps:
        rows, columns = tile_counts(*x.shape[2:])
        size = (len(x), out_channels, TILE * rows, TILE * columns)
        results.append(torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
        tiled.append(results[-1].permute(0, 2, 3, 1).view(len(x), rows, TILE, columns, TILE, out_channels))
    for pieces in in_pieces(maps, VALUES_AT_ONCE):
        transformed = [to_input @ windows(maps[i], start, stop) for i, start, stop in pieces]  # [36, B tiles C]
        products = torch.bmm(_joined(transformed).view(WINDOW**2, -1, channels), weight)  # [36, tiles of all maps, O]
        outputs = (to_output @ products.view(WINDOW**2, -1)).view(TILE, TILE, -1, out_channels)  # [4, 4, tiles, O]
        counts = [len(maps[i]) * (stop - start) * tiled[i].shape[3] for i, start, stop in pieces]
        for (i, start, stop), tiles in zip(pieces, outputs.split(counts, dim=2)):
            target = tiled[i][:, start:stop].permute(2, 4, 0, 1, 3, 5)  # [4, 4, B, rows, columns, O]
            tiles = tiles.reshape(target.shape)
            target.copy_(tiles if bias is None else tiles + bias)
    # No views are returned: autograd forbids in-place changes of the views of a custom function.
    return [
        y if y.shape[2:] == x.shape[2:] else y[..., : x.shape[2], : x.shape[3]].clone(memory_format=torch.channels_last)
        for x, y in zip(maps, results)
    ]


def weight_gradient(maps: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Gradient [O, C, 3, 3] of the weight from the maps [B, C, H, W] and the gradients of the results [B, O, H, W]."""
    to_input, from_output = matrix("input", maps[0]), matrix("output", maps[0]).T.contiguous()
    channels, out_channels = maps[0].shape[1], gradients[0].shape[1]
    total = maps[0].new_zeros(WINDOW**2, channels, out_channels)
    for pieces in in_pieces(maps, VALUES_PER_GRADIENT):
        inputs = _joined([to_input @ windows(maps[i], start, stop) for i, start, stop in pieces])
        outputs = _joined([from_output @ tiles_of(gradients[i], start, stop) for i, start, stop in pieces])
        inputs, outputs = inputs.view(WINDOW**2, -1, channels), outputs.view(WINDOW**2, -1, out_channels)
        total.baddbmm_(inputs.transpose(1, 2), outputs)
    to_weight = matrix("weight", total)  # [36, 9]
    return (to_weight.T @ total.view(WINDOW**2, -1)).view(3, 3, channels, out_channels).permute(3, 2, 0, 1)


def transform_weight(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] -> [36, C, O]."""
    out_channels, channels = weight.shape[:2]
    columns = weight.permute(2, 3, 1, 0).reshape(9, -1)
    return (matrix("weight", weight) @ columns).view(WINDOW**2, channels, out_channels)


def windows(x: Tensor, start: int, stop: int) -> Tensor:
    """The overlapping 6x6 windows of the tile rows start..stop of a map [B, C, H, W], [36, B tiles C]."""
    parts = padded_rows(x, start, stop, border=1).unfold(1, WINDOW, TILE).unfold(2, WINDOW, TILE)
    return parts.permute(4, 5, 0, 1, 2, 3).reshape(WINDOW**2, -1)


def tiles_of(x: Tensor, start: int, stop: int) -> Tensor:
    """The 4x4 tiles of the tile rows start..stop of a map [B, C, H, W], [16, B tiles C]."""
    parts = padded_rows(x, start, stop, border=0).unfold(1, TILE, TILE).unfold(2, TILE, TILE)
    return parts.permute(4, 5, 0, 1, 2, 3).reshape(TILE**2, -1)


def padded_rows(x: Tensor, start: int, stop: int, *, border: int) -> Tensor:
    """Tile rows start..stop of a map [B, C, H, W] with `border` pixels around, zeros outside: [B, h, w, C]."""
    height, width = x.shape[2:]
    first, last = TILE * start - border, TILE * stop + border
    top, bottom, right = max(0, -first), max(0, last - height), TILE * tile_counts(height, width)[1] + border - width
    rows = x.permute(0, 2, 3, 1)[:, max(0, first) : last]
    return F.pad(rows, (0, 0, border, right, top, bottom)) if max(border, right, top, bottom) else rows


def tile_counts(height: int, width: int) -> tuple[int, int]:
    """Tiles that cover a map: rows and columns."""
    return -(-height // TILE), -(-width // TILE)


def in_pieces(maps: Sequence[Tensor], values: int) -> Iterator[list[tuple[int, int, int]]]:
    """Groups of (map, first tile row, tile row after the last) with about `values` transformed numbers each."""
    group: list[tuple[int, int, int]] = []
    free = values
    for i, x in enumerate(maps):
        rows, columns = tile_counts(*x.shape[2:])
        per_row = WINDOW**2 * len(x) * columns * x.shape[1]
        start = 0
        while start < rows:
            take = min(rows - start, max(free // per_row, 0 if group else 1))
            if take:
                group.append((i, start, start + take))
                start, free = start + take, free - take * per_row
            if start < rows:
                yield group
                group, free = [], values
    if group:
        yield group


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def matrix(kind: str, like: Tensor) -> Tensor:
    """The two-dimensional transform of "input" [36, 36], "weight" [36, 9] or "output" [16, 36] in `like`'s dtype."""
    return torch.tensor(MATRICES[kind], dtype=like.dtype, device=like.device)


def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices of the one-dimensional F(4, 3), float64: input [6, 6], weight [6, 3], output [4, 6].

    A product of polynomials of degree 2 and 3 is known from its values at six points; the filter is that product's
    transpose (Toom and Cook). Rows are scaled so that weights and inputs are transformed with similar magnitudes.
    """
    three, four, six = (_powers(count) for count in (3, 4, 6))
    to_input = np.linalg.inv(six).T
    scale = np.abs(to_input).max(1, keepdims=True)
    return to_input / scale, three * scale, four.T


def _powers(count: int) -> np.ndarray:
    """Powers 0 .. count - 1 of every point [6, count]; at infinity only the highest counts."""
    rows = [[0.0] * (count - 1) + [1.0] if math.isinf(p) else [p**k for k in range(count)] for p in POINTS]
    return np.array(rows)


MATRICES = {
    name: np.kron(one, one).tolist() for name, one in zip(("input", "weight", "output"), transforms(), strict=True)
}
