"""The masks of one image where none overlap, as one map: resized, cropped, flipped or transposed at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.masks import CHUNK_BYTES, planes_at_once
from solov2.ops.panoptic import measure_segments
from solov2.ops.resize import source_indices


@dataclass(frozen=True, eq=False)
class MaskMap:
    """N masks of one image. `shape`, `flip`, `mT` and indexing are those of a tensor [N, h, w] of the masks.

    As nearest-neighbor resizing only chooses pixels, it gives the same masks as resizing each one.
    """

    keys: np.ndarray  # int64 [N], distinct and not 0
    values: np.ndarray  # integers [h, w]: a mask has the pixels with its key

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, h, w)."""
        return len(self), *self.values.shape

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, keep: Tensor) -> MaskMap:
        """The masks where `keep`, bool [N], is True."""
        return replace(self, keys=self.keys[keep.numpy()])

    def resize(self, size: tuple[int, int]) -> MaskMap:
        """Resize to `size` (h, w), as `resize_masks` does."""
        rows, columns = (source_indices(n, m) for n, m in zip(self.values.shape, size))
        return replace(self, values=self.values.take(rows, axis=0).take(columns, axis=1))

    def crop(self, rows: slice, columns: slice) -> MaskMap:
        """The part of each mask in these rows and columns."""
        return replace(self, values=self.values[rows, columns])

    def flip(self, dims: Sequence[int]) -> MaskMap:
        """Reverse dimensions: 1 is top to bottom, 2 left to right."""
        return replace(self, values=np.flip(self.values, tuple(dim - 1 for dim in dims)))

    @property
    def mT(self) -> MaskMap:  # noqa: N802, the name in torch
        """Transpose each mask."""
        return replace(self, values=self.values.T)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw the masks in order, as many at a time as fit into `max_bytes`, but at least one.

        Yields:
            masks: uint8 [n, h, w]; one chunk of n = 0 where there are no masks.
            extents: int64 [n, 4], boxes x1, y1, x2, y2, maximum exclusive, outside of which the masks are 0.
        """
        table = measure_segments(self.values)
        boxes = dict(zip(table.ids.tolist(), table.boxes.tolist()))
        step = planes_at_once(self.shape[1:], max_bytes)
        for start in range(0, max(1, len(self)), step):
            keys = self.keys[start : start + step].tolist()
            extents = [boxes.get(key, (0, 0, 0, 0)) for key in keys]
            planes = np.zeros((len(keys), *self.values.shape), dtype=np.uint8)
            for key, plane, (x1, y1, x2, y2) in zip(keys, planes, extents):
                plane[y1:y2, x1:x2] = self.values[y1:y2, x1:x2] == key
            yield torch.from_numpy(planes), torch.tensor(extents, dtype=torch.int64).reshape(-1, 4)


Masks: TypeAlias = Tensor | EncodedMasks | MaskMap
"""N masks of one image: planes uint8 or bool [N, h, w], or what is only drawn at the size of the targets."""
