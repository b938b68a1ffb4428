"""3x3 convolutions with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3), for CPUs.

Every 6x6 window of the input is transformed, multiplied by the transformed weight and transformed back into 4x4
outputs: 36 multiplications where plain convolution takes 144. Both gradients are products of the same kind. Source:
Lavin and Gray 2016 (arXiv 1509.09308). Rounding errors in float32 are about four times those of plain convolution.
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

from solov2.models.coordinates import convolve_each

TILE = 4  # outputs per tile and axis
WINDOW = TILE + 2  # inputs per tile and axis
# Points at which the polynomials of the transform are evaluated, chosen to keep rounding errors small.
POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2), math.inf)
# With fewer channels, the transforms cost more than the multiplications they save. CPUs with AVX-512 multiply twice as
# fast, but read and write memory no faster. Measured: 64 channels 0.77 times as fast as plain convolution with AVX-512,
# 128 channels 1.1 to 1.3 times, 256 channels 1.3 to 1.7 times.
MIN_CHANNELS = 128 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64
MIN_TILES = 12  # with fewer, reading the transformed weights costs more
MIN_TRAINING_TILES = 96  # the same in training, which transforms weights and their gradients in every step
CHUNK_VALUES = 2**21  # transformed input values per chunk, which stay in the CPU's cache
GRADIENT_CHUNK_VALUES = 2**22  # the same for the weight gradient, where each chunk is added to 36 C O values


class WinogradConv2d(nn.Conv2d):
    """`nn.Conv2d` (3x3, stride 1, padding 1) with the same parameters, computed by F(4x4, 3x3).

    Unless `prepare` was called, it is used only in training without autocast, so that evaluation rounds as plain
    convolution does. Maps too small to gain use plain convolution, too. Results are channels last.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device)
        self.register_buffer("prepared", None, persistent=False)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> WinogradConv2d:
        """The same convolution, sharing the parameters of `conv`."""
        new = cls(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta")
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    @staticmethod
    def is_suitable(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether a module is a convolution of this kind with enough channels to gain."""
        if not isinstance(conv, nn.Conv2d):
            return False
        kind = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        wide = min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
        return kind == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and wide

    def prepare(self) -> None:
        """Transform the weight once, for a network that will not be trained further."""
        self.prepared = transform_weight(self.weight.detach().double()).to(self.weight.dtype)

    def convolve_maps(self, maps: Sequence[Tensor], weight: Tensor | None = None) -> list[Tensor]:
        """Convolve several maps [B, C, H, W] in one product: list of [B, O, H, W].

        `weight` replaces the layer's own, see `_convolve`.
        """
        return self._convolve(maps, self.weight if weight is None else weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve([x], weight, bias)[0]

    def _convolve(self, maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """`weight` is the layer's own, or its part for the first input channels."""
        if self.prepared is not None:
            function = compiled_convolve if torch.compiler.is_compiling() else convolve_if_large
            return function(list(maps), self.prepared[:, : weight.shape[1]], weight, bias)
        large = tile_count(maps) >= MIN_TRAINING_TILES
        if self.training and large and not torch.is_autocast_enabled(weight.device.type):
            return list(WinogradFunction.apply(weight, bias, *maps))
        return [super(WinogradConv2d, self)._conv_forward(x, weight, bias) for x in maps]


class WinogradFunction(torch.autograd.Function):
    """(weight [O, C, 3, 3], bias [O] or None, maps [B, C, H, W]...) -> as many maps [B, O, H, W]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        """`convolve` with a weight that is yet to be transformed."""
        ctx.save_for_backward(weight, *maps)
        return tuple(convolve(maps, transform_weight(weight), bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of weight, bias and maps, or None where not needed."""
        weight, *maps = ctx.saved_tensors
        needs_weight, needs_bias, *needs_maps = ctx.needs_input_grad
        weight_grad = weight_gradient(maps, gradients) if needs_weight else None
        sums = (gradient.sum((0, 2, 3)) for gradient in gradients)
        bias_grad = functools.reduce(torch.add, sums) if needs_bias else None
        map_grads: Sequence[Tensor | None] = [None] * len(maps)
        if any(needs_maps):  # the convolution with the weight rotated by 180 degrees
            map_grads = convolve(gradients, transform_weight(weight.flip(2, 3).transpose(0, 1)), None)
        return weight_grad, bias_grad, *map_grads


def convolve_if_large(maps: list[Tensor], prepared: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """`convolve` with a weight that is transformed already, or plain convolution of maps too small to gain."""
    if tile_count(maps) >= MIN_TILES:
        return convolve(maps, prepared, bias)
    return [F.conv2d(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last) for x in maps]


# One operation for `torch.compile`, which would otherwise specialize the loops over tiles to one size of the maps.
compiled_convolve = torch.library.custom_op("solov2::winograd", convolve_if_large, mutates_args=())


@compiled_convolve.register_fake
def _(maps: list[Tensor], prepared: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [
        x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        for x in maps
    ]


def convolve_levels_jointly(conv: nn.Module, maps: Sequence[Tensor], weight: Tensor | None = None) -> list[Tensor]:
    """Convolve several maps [B, C, H, W], in one product if `conv` supports it: list of [B, O, H, W]."""
    return conv.convolve_maps(maps, weight) if isinstance(conv, WinogradConv2d) else convolve_each(conv, maps, weight)


def convolve(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Convolve maps [B, C, H, W] with a transformed weight [36, C, O], add bias [O]: [B, O, H, W], channels last."""
    input_transform, output_transform = transform_matrix("input", maps[0]), transform_matrix("output", maps[0])
    channels, out_channels = weight.shape[1:]
    results, tiled = [], []
    for x in maps:
        rows, columns = tile_counts(*x.shape[2:])
        size = (len(x), out_channels, TILE * rows, TILE * columns)
        results.append(torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
        tiled.append(results[-1].permute(0, 2, 3, 1).view(len(x), rows, TILE, columns, TILE, out_channels))
    for chunk in split_work(maps, CHUNK_VALUES):
        transformed = [input_transform @ windows(maps[i], start, stop) for i, start, stop in chunk]  # [36, B tiles C]
        products = torch.bmm(_concatenate(transformed).view(WINDOW**2, -1, channels), weight)  # [36, tiles, O]
        outputs = output_transform @ products.view(WINDOW**2, -1)  # [16, tiles O], tiles of all maps
        outputs = outputs.view(TILE, TILE, -1, out_channels)  # [4, 4, tiles, O]
        counts = [len(maps[i]) * (stop - start) * tiled[i].shape[3] for i, start, stop in chunk]
        for (i, start, stop), tiles in zip(chunk, outputs.split(counts, dim=2)):
            target = tiled[i][:, start:stop].permute(2, 4, 0, 1, 3, 5)  # [4, 4, B, rows, columns, O]
            tiles = tiles.reshape(target.shape)
            if bias is None:
                target.copy_(tiles)
            else:
                torch.add(tiles, bias, out=target)
    # Never return views: autograd forbids changing views returned by a custom function in place.
    return [
        y if y.shape[2:] == x.shape[2:] else y[..., : x.shape[2], : x.shape[3]].clone(memory_format=torch.channels_last)
        for x, y in zip(maps, results)
    ]


def weight_gradient(maps: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Weight gradient [O, C, 3, 3] from the maps [B, C, H, W] and the gradients of the results [B, O, H, W]."""
    input_transform = transform_matrix("input", maps[0])  # [36, 36]
    gradient_transform = transform_matrix("output", maps[0]).T.contiguous()  # [36, 16]
    channels, out_channels = maps[0].shape[1], gradients[0].shape[1]
    total = maps[0].new_zeros(WINDOW**2, channels, out_channels)
    for chunk in split_work(maps, GRADIENT_CHUNK_VALUES):
        inputs = _concatenate([input_transform @ windows(maps[i], start, stop) for i, start, stop in chunk])
        outputs = _concatenate([gradient_transform @ tiles_in(gradients[i], start, stop) for i, start, stop in chunk])
        inputs, outputs = inputs.view(WINDOW**2, -1, channels), outputs.view(WINDOW**2, -1, out_channels)
        total.baddbmm_(inputs.transpose(1, 2), outputs)
    weight_transform = transform_matrix("weight", total)  # [36, 9]
    return (weight_transform.T @ total.view(WINDOW**2, -1)).view(3, 3, channels, out_channels).permute(3, 2, 0, 1)


def transform_weight(weight: Tensor) -> Tensor:
    """Transform a weight: [O, C, 3, 3] -> [36, C, O]."""
    out_channels, channels = weight.shape[:2]
    columns = weight.permute(2, 3, 1, 0).reshape(9, -1)
    return (transform_matrix("weight", weight) @ columns).view(WINDOW**2, channels, out_channels)


def windows(x: Tensor, start: int, stop: int) -> Tensor:
    """The overlapping 6x6 windows of tile rows [start, stop) of a map [B, C, H, W]: [36, B tiles C]."""
    parts = padded_rows(x, start, stop, border=1).unfold(1, WINDOW, TILE).unfold(2, WINDOW, TILE)
    return parts.permute(4, 5, 0, 1, 2, 3).reshape(WINDOW**2, -1)


def tiles_in(x: Tensor, start: int, stop: int) -> Tensor:
    """The 4x4 tiles of tile rows [start, stop) of a map [B, C, H, W]: [16, B tiles C]."""
    parts = padded_rows(x, start, stop, border=0).unfold(1, TILE, TILE).unfold(2, TILE, TILE)
    return parts.permute(4, 5, 0, 1, 2, 3).reshape(TILE**2, -1)


def padded_rows(x: Tensor, start: int, stop: int, *, border: int) -> Tensor:
    """Tile rows [start, stop) of a map [B, C, H, W] with a border of `border` pixels, zero-padded: [B, h, w, C]."""
    height, width = x.shape[2:]
    first, last = TILE * start - border, TILE * stop + border
    top, bottom, right = max(0, -first), max(0, last - height), TILE * tile_counts(height, width)[1] + border - width
    rows = x.permute(0, 2, 3, 1)[:, max(0, first) : last]
    return F.pad(rows, (0, 0, border, right, top, bottom)) if max(border, right, top, bottom) else rows


def tile_count(maps: Sequence[Tensor]) -> int:
    """Tiles that cover all maps of a batch."""
    return sum(len(x) * math.prod(tile_counts(*x.shape[2:])) for x in maps)


def tile_counts(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover a map."""
    return -(-height // TILE), -(-width // TILE)


def split_work(maps: Sequence[Tensor], values: int) -> Iterator[list[tuple[int, int, int]]]:
    """Groups of (map index, first tile row, tile row after the last) with about `values` transformed values each."""
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


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def transform_matrix(kind: str, like: Tensor) -> Tensor:
    """The 2-D transform of "input" [36, 36], "weight" [36, 9] or "output" [16, 36], with `like`'s dtype and device."""
    return torch.tensor(MATRICES[kind], dtype=like.dtype, device=like.device)


def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices of the one-dimensional F(4, 3), float64: input [6, 6], weight [6, 3], output [4, 6].

    A product of polynomials of degrees 2 and 3 is determined by its values at six points; filtering is the transpose
    of that product (Toom and Cook). Rows are scaled so that transformed weights and inputs have similar magnitudes.
    """
    three, four, six = (_powers(count) for count in (3, 4, 6))
    input_transform = np.linalg.inv(six).T
    scale = np.abs(input_transform).max(1, keepdims=True)
    return input_transform / scale, three * scale, four.T


def _powers(count: int) -> np.ndarray:
    """Powers 0 .. count - 1 of every point, float64 [6, count]; at infinity only the highest power counts."""
    rows = [[0.0] * (count - 1) + [1.0] if math.isinf(p) else [p**k for k in range(count)] for p in POINTS]
    return np.array(rows)


MATRICES = {
    name: np.kron(one, one).tolist() for name, one in zip(("input", "weight", "output"), transforms(), strict=True)
}
