"""Ground truth -> category map, positive (image, cell, instance) triples and stride-4 masks (paper section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from solov2.ops.masks import centers_of_mass
from solov2.ops.resize import quarter_masks


class TargetAssigner:
    """Assigns instances to grid cells as the reference does, in float32.

    An instance belongs to every level whose scale range holds sqrt(box area), bounds included. There it takes the cells
    of its centre region (box scaled by `center_sigma` around the centre of mass of the mask), at most one cell away
    from the centre's own cell. A later instance overwrites the category of a shared cell; both keep their mask entry.

    Args:
        grid_sizes: S of each level, finest first.
        scale_ranges: (lowest, highest) sqrt(box area) of each level, in input pixels.
        num_classes: C; the background has index C.
        center_sigma: size of the centre region as a share of the box.

    Raises:
        ValueError: grid_sizes and scale_ranges differ in length.
    """

    def __init__(
        self,
        grid_sizes: Sequence[int],
        scale_ranges: Sequence[tuple[float, float]],
        *,
        num_classes: int,
        center_sigma: float = 0.2,
    ) -> None:
        if len(grid_sizes) != len(scale_ranges):
            raise ValueError(
                f"{len(grid_sizes)} grid sizes but {len(scale_ranges)} scale ranges; give one of each per level"
            )
        self.grid_sizes = tuple(grid_sizes)
        self.scale_ranges = tuple((float(low), float(high)) for low, high in scale_ranges)
        self.num_classes = num_classes
        self.center_sigma = center_sigma
        self.num_cells = sum(size * size for size in self.grid_sizes)

    def __call__(self, instances: Sequence[dict[str, Tensor]], padded_size: tuple[int, int]) -> dict[str, Any]:
        """Targets of a batch.

        Args:
            instances: per image boxes float32 [N, 4] x1, y1, x2, y2 (of the annotation, in input pixels), labels
                int64 [N], masks uint8 [N, h, w] of 0 and 1 at the size of the image before padding.
            padded_size: (H, W) of the batch, multiples of 32.

        Returns:
            category: int64 [B, cells], background = num_classes, cells of all levels one after another, row-major.
            positives: int64 [P, 3] = (image, cell, instance); sorted by image, then level, then instance, then cell.
                The instance counts through the whole batch.
            masks: uint8 [sum N, H / 4, W / 4].
            positives_per_image, instances_per_image: lists of B integers, on the host.
        """
        quarter = (padded_size[0] // 4, padded_size[1] // 4)
        categories, positives, masks, offset = [], [], [], 0
        for image, truth in enumerate(instances):
            category, pairs = self._assign(truth["boxes"], truth["labels"], truth["masks"], padded_size)
            categories.append(category)
            images = torch.full_like(pairs[:, :1], image)
            positives.append(torch.cat([images, pairs + torch.tensor([0, offset])], dim=1))
            masks.append(_pad(quarter_masks(truth["masks"]), quarter))
            offset += len(truth["labels"])
        return {
            "category": torch.stack(categories),
            "positives": torch.cat(positives),
            "masks": torch.cat(masks),
            "positives_per_image": [len(pairs) for pairs in positives],
            "instances_per_image": [len(truth["labels"]) for truth in instances],
        }

    def _assign(
        self, boxes: Tensor, labels: Tensor, masks: Tensor, padded_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """One image: category int64 [cells] and (cell, instance) pairs int64 [P, 2]."""
        center_y, center_x = centers_of_mass(masks)
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        scale = (width * height).clamp(min=0).sqrt()
        half_height, half_width = 0.5 * height * self.center_sigma, 0.5 * width * self.center_sigma
        visible = masks.flatten(1).any(1)

        category = torch.full((self.num_cells,), self.num_classes, dtype=torch.int64)
        pairs, first_cell = [], 0
        for size, (low, high) in zip(self.grid_sizes, self.scale_ranges, strict=True):
            chosen = ((scale >= low) & (scale <= high) & visible).nonzero()[:, 0]
            rows = _cell_range(center_y[chosen], half_height[chosen], padded_size[0], size)  # [n, 3], -1 where unused
            columns = _cell_range(center_x[chosen], half_width[chosen], padded_size[1], size)
            used = (rows >= 0)[:, :, None] & (columns >= 0)[:, None, :]  # [n, 3, 3]
            which, row, column = used.nonzero(as_tuple=True)
            cells = first_cell + rows[which, row] * size + columns[which, column]
            pairs.append(torch.stack([cells, chosen[which]], dim=1))
            first_cell += size * size
        pairs = torch.cat(pairs)
        last = torch.full((self.num_cells,), -1).scatter_reduce(0, pairs[:, 0], pairs[:, 1], "amax")
        category[last >= 0] = labels[last[last >= 0]]
        return category, pairs


def _cell(position: Tensor, extent: int, size: int) -> Tensor:
    """Grid index of a position: trunc((position / extent) / (1 / S)) in float32, 1 / S rounded to float32 first.

    Not the same as floor(position * S / extent) at and near cell borders; this is what the reference trains with.
    """
    step = torch.tensor(1 / size, dtype=torch.float32)
    return torch.trunc(position / extent / step).long()


def _cell_range(center: Tensor, half: Tensor, extent: int, size: int) -> Tensor:
    """Rows (or columns) of the centre region: int64 [n, 3], ascending, -1 in unused places."""
    own = _cell(center, extent, size)
    first = torch.maximum(_cell(center - half, extent, size), own - 1).clamp(min=0)
    last = torch.minimum(_cell(center + half, extent, size), own + 1).clamp(max=size - 1)
    indices = first[:, None] + torch.arange(3)
    return torch.where(indices <= last[:, None], indices, -1)


def _pad(masks: Tensor, size: tuple[int, int]) -> Tensor:
    padded = masks.new_zeros(len(masks), *size)
    padded[:, : masks.shape[1], : masks.shape[2]] = masks
    return padded
