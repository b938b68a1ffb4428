"""Ground truth -> category map, positive (image, cell, instance) triples and stride-4 masks.

SOLOv2 (Wang et al. 2020, section 2.1.4) keeps the label assignment of SOLO (arXiv 1912.04488, "Label Assignment").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.mask_map import MaskMap
from solov2.ops.masks import centers_of_mass
from solov2.ops.resize import quarter_masks

IGNORED = 255  # label of pixels that nobody has annotated


class TargetAssigner:
    """Assigns instances to grid cells as the reference does, in float32.

    An instance belongs to every level whose scale range contains sqrt(box area), bounds included; the ranges overlap,
    so usually to two. There it takes the cells of its center region (the box scaled by `center_sigma` and moved to the
    mask's center of mass), at most one cell away from the center's own cell. A later instance overwrites the category
    of a shared cell; both keep their positive entry.

    Args:
        grid_sizes: S of each level, finest first.
        scale_ranges: (minimum, maximum) sqrt(box area) of each level, in input pixels.
        num_classes: C; the background has index C.
        center_sigma: size of the center region as a fraction of the box.

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

    def __call__(self, instances: Sequence[dict[str, Any]], padded_size: tuple[int, int]) -> dict[str, Any]:
        """Assign the targets of a batch.

        Args:
            instances: per image boxes float32 [N, 4] x1, y1, x2, y2 (of the annotation, in input pixels), labels
                int64 [N], masks uint8 of 0 and 1 or bool [N, h, w] at the size of the image before padding, or
                `EncodedMasks` or `MaskMap` of that shape, which take less memory; in panoptic data also semantic uint8
                [h, w]. All on the CPU.
            padded_size: (H, W) of the batch, multiples of 32.

        Returns:
            category: int64 [B, cells], background = num_classes; cells of all levels concatenated, row-major.
            positives: int64 [P, 3] = (image, cell, instance); sorted by image, then level, then instance, then cell.
                Instances are numbered across the batch.
            masks: uint8 [sum N, H / 4, W / 4].
            positives_per_image, instances_per_image: lists of B integers.
            semantic: uint8 [B, H / 4, W / 4], in panoptic data.
        """
        quarter = (padded_size[0] // 4, padded_size[1] // 4)
        categories, positives, masks, offset = [], [], [], 0
        for image, truth in enumerate(instances):
            centers, quarters = _reduce(truth["masks"], quarter)
            category, pairs = self._assign(truth["boxes"], truth["labels"], centers, padded_size)  # [cells], [P_i, 2]
            categories.append(category)
            images = torch.full_like(pairs[:, :1], image)  # [P_i, 1]
            positives.append(torch.cat([images, pairs + torch.tensor([0, offset])], dim=1))  # [P_i, 3]
            masks += quarters  # each [n, H / 4, W / 4]
            offset += len(truth["labels"])
        maps = [semantic_target(truth["semantic"], padded_size) for truth in instances if "semantic" in truth]
        semantic = {"semantic": torch.stack(maps)} if maps else {}
        return {
            "category": torch.stack(categories),  # [B, cells]
            "positives": torch.cat(positives),  # [P, 3]
            "masks": torch.cat(masks),  # [sum N, H / 4, W / 4]
            "positives_per_image": [len(pairs) for pairs in positives],
            "instances_per_image": [len(truth["labels"]) for truth in instances],
            **semantic,
        }

    def _assign(
        self,
        boxes: Tensor,
        labels: Tensor,
        centers: tuple[Tensor, Tensor, Tensor],
        padded_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """One image: category int64 [cells] and (cell, instance) pairs int64 [P, 2]."""
        center_y, center_x, area = centers  # [N] each
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]  # [N] each
        scale = (width * height).clamp(min=0).sqrt()  # [N], of the box, not of the mask, as in the reference
        low, high = torch.tensor(self.scale_ranges).reshape(-1, 2, 1).unbind(1)  # [levels, 1] each
        # An empty mask has no center of mass, so it gets no cell.
        level, chosen = ((scale >= low) & (scale <= high) & (area > 0)).nonzero(as_tuple=True)  # [n] each, by level

        sizes = torch.tensor(self.grid_sizes)  # [levels]
        size, first_cell = sizes[level], (sizes.square().cumsum(0) - sizes.square())[level]  # [n] each
        center = torch.stack((center_y, center_x))[:, chosen]  # [2, n], y and x
        half = 0.5 * torch.stack((height, width))[:, chosen] * self.center_sigma  # [2, n]
        extent = torch.tensor(padded_size, dtype=torch.float32)[:, None]  # [2, 1]
        first, own, last = _cell(torch.stack((center - half, center, center + half)), extent, size)  # [2, n] each
        first = torch.maximum(first, own - 1).clamp(min=0)  # [2, n]
        last = torch.minimum(last, own + 1).minimum(size - 1)  # [2, n]

        indices = first[..., None] + torch.arange(3)  # [2, n, 3], rows and columns of at most 3 x 3 cells
        in_rows, in_columns = indices <= last[..., None]  # [n, 3] each
        which, row, column = (in_rows[:, :, None] & in_columns[:, None, :]).nonzero(as_tuple=True)  # [P] each
        cells = first_cell[which] + indices[0, which, row] * size[which] + indices[1, which, column]  # [P]
        pairs = torch.stack([cells, chosen[which]], dim=1)  # [P, 2]

        category = torch.full((self.num_cells,), self.num_classes, dtype=torch.int64)  # [cells], all background
        latest = torch.full((self.num_cells,), -1).scatter_reduce(0, pairs[:, 0], pairs[:, 1], "amax")  # [cells], or -1
        category[latest >= 0] = labels[latest[latest >= 0]]
        return category, pairs


def semantic_target(labels: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """The labels at the centers of 4 x 4 blocks, `IGNORED` beyond the map: uint8 [H / 4, W / 4].

    Labels are never averaged. The upper left pixel of each block, which mmdetection takes, would move every border by
    1.5 pixels against the masks of the instances.

    Args:
        labels: uint8 [h, w], the semantic map of an image before padding.
        padded_size: (H, W) of the batch, multiples of 4.
    """
    target = labels.new_full((padded_size[0] // 4, padded_size[1] // 4), IGNORED)
    centers = labels[2::4, 2::4]
    target[: centers.shape[0], : centers.shape[1]] = centers
    return target


def _reduce(
    masks: Tensor | EncodedMasks | MaskMap, size: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """Centers of mass (y, x, area, each [N]) and quarter masks uint8 [n, *size], in parts, of the masks of an image."""
    chunks = [(masks, None)] if isinstance(masks, Tensor) else masks.chunks()
    parts = [(centers_of_mass(planes, extents), quarter_masks(planes, size, extents)) for planes, extents in chunks]
    y, x, area = (torch.cat(values) for values in zip(*(centers for centers, _ in parts)))
    return (y, x, area), [quarters for _, quarters in parts]


def _cell(position: Tensor, extent: Tensor, size: Tensor) -> Tensor:
    """Grid index of positions: trunc((position / extent) / (1 / S)) in float32, with 1 / S rounded to float32 first.

    This differs from floor(position * S / extent) at and near cell borders; mmdetection trains with it.
    """
    step = (1 / size.double()).float()  # [n]
    return torch.trunc(position / extent / step).long()  # [3, 2, n]
