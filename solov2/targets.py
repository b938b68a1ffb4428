"""Ground truth -> category map, positive (image, cell, instance) triples and stride-4 masks.

SOLOv2 (Wang et al. 2020, section 2.1.4) keeps the label assignment of SOLO (arXiv 1912.04488, "Label Assignment").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from solov2.ops.mask_map import Masks
from solov2.ops.masks import centers_of_mass
from solov2.ops.panoptic import IGNORED
from solov2.ops.resize import quarter_masks

BLOCK_CENTERS = slice(2, None, 4)  # of blocks of 4 pixels


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
            instances: one dictionary per image, all on the CPU, with boxes float32 [N, 4] as x1, y1, x2, y2 (of the
                annotation, in input pixels); labels int64 [N]; masks bool, or uint8 of 0 and 1, [N, h, w] at the size
                of the image before padding, or `EncodedMasks` or `MaskMap` of that shape, which take less memory. In
                panoptic data also semantic uint8 [h, w]; for an auxiliary semantic loss also ignored, M masks of any of
                these kinds, [M, h, w].
            padded_size: (H, W) of the batch, multiples of 32.

        Returns:
            category: int64 [B, cells], background = num_classes; cells of all levels concatenated, row-major.
            positives: int64 [P, 3] = (image, cell, instance); sorted by image, then level, then instance, then cell.
                Instances are numbered across the batch.
            masks: uint8 [sum N, H / 4, W / 4], 0 and 1.
            positives_per_image, instances_per_image: lists of B integers.
            semantic: uint8 [B, H / 4, W / 4], only in panoptic data and for an auxiliary semantic loss, as sampled by
                `semantic_target`. In panoptic data: the labels of `semantic`. For an auxiliary loss: the label of the
                one instance at a pixel, or num_classes if there is none, or `IGNORED` where instances overlap and under
                ignored masks. The padding is `IGNORED` in both.
        """
        quarter = (padded_size[0] // 4, padded_size[1] // 4)
        categories, positives, masks, maps, offset = [], [], [], [], 0
        for image, truth in enumerate(instances):
            union = _Union(self.num_classes, truth["masks"].shape[1:]) if "ignored" in truth else None
            centers, quarters = _reduce(truth["masks"], quarter, truth["labels"], union)
            category, pairs = self._assign(truth["boxes"], truth["labels"], centers, padded_size)  # [cells], [P_i, 2]
            categories.append(category)
            images = torch.full_like(pairs[:, :1], image)  # [P_i, 1]
            positives.append(torch.cat([images, pairs + torch.tensor([0, offset])], dim=1))  # [P_i, 3]
            masks += quarters  # each [n, H / 4, W / 4]
            offset += len(truth["labels"])
            if union is not None:
                maps.append(_pad(union.labels_without(truth["ignored"]), quarter))
            elif "semantic" in truth:
                maps.append(semantic_target(truth["semantic"], padded_size))
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
    """Reduce a semantic map to stride 4 by taking the pixel at the center of each 4 x 4 block.

    Labels are never averaged. The upper left pixel of each block, which mmdetection takes, would shift every border by
    1.5 pixels relative to the masks of the instances.

    Args:
        labels: uint8 [h, w], the semantic map of an image before padding.
        padded_size: (H, W) of the batch, multiples of 4.

    Returns:
        uint8 [H / 4, W / 4], `IGNORED` outside the image.
    """
    return _pad(labels[BLOCK_CENTERS, BLOCK_CENTERS], (padded_size[0] // 4, padded_size[1] // 4))


def _pad(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels uint8 [h, w] -> [*size], `IGNORED` beyond them."""
    target = labels.new_full(size, IGNORED)
    target[: labels.shape[0], : labels.shape[1]] = labels
    return target


class _Union:
    """The labels of the instances of an image in one map, at the centers of 4 x 4 blocks.

    Args:
        background: label where there is no instance.
        size: (h, w) of the image before padding.
    """

    def __init__(self, background: int, size: Sequence[int]) -> None:
        height, width = (len(range(side)[BLOCK_CENTERS]) for side in size)
        self.background = background
        self.count, self.total = torch.zeros(2, height, width)  # of the masks at each pixel, and of their labels

    def add(self, planes: Tensor, labels: Tensor) -> None:
        """Add instances with masks uint8 or bool [n, h, w] and labels int64 [n]."""
        pixels = planes[:, BLOCK_CENTERS, BLOCK_CENTERS].flatten(1).float()  # [n, pixels]
        count, total = torch.stack((torch.ones_like(labels), labels)).float() @ pixels  # float32 holds them exactly
        self.count += count.view_as(self.count)
        self.total += total.view_as(self.total)

    def labels_without(self, ignored: Masks) -> Tensor:
        """uint8 [h / 4, w / 4], `IGNORED` where instances overlap and where an ignored mask lies."""
        labels = torch.where(self.count == 0, self.background, self.total)
        void = self.count > 1
        for planes, _ in _chunks(ignored):
            void |= planes[:, BLOCK_CENTERS, BLOCK_CENTERS].bool().any(0)
        return labels.masked_fill(void, IGNORED).to(torch.uint8)


def _chunks(masks: Masks) -> Iterable[tuple[Tensor, Tensor | None]]:
    """(planes uint8 or bool [n, h, w], boxes int64 [n, 4] outside of which they are 0, if known), in order."""
    return [(masks, None)] if isinstance(masks, Tensor) else masks.chunks()


def _reduce(
    masks: Masks, size: tuple[int, int], labels: Tensor, union: _Union | None
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """Centers of mass (y, x, area, each [N]) and quarter masks uint8 [n, *size], in parts, of the masks of an image.

    Drawing masks takes long, so those of a union are added on the way, with their labels int64 [N].
    """
    centers, quarters, first = [], [], 0
    for planes, extents in _chunks(masks):
        centers.append(centers_of_mass(planes, extents))
        quarters.append(quarter_masks(planes, size, extents))
        if union is not None:
            union.add(planes, labels[first : first + len(planes)])
        first += len(planes)
    y, x, area = (torch.cat(values) for values in zip(*centers))
    return (y, x, area), quarters


def _cell(position: Tensor, extent: Tensor, size: Tensor) -> Tensor:
    """Grid index of positions: trunc((position / extent) / (1 / S)) in float32, with 1 / S rounded to float32 first.

    This differs from floor(position * S / extent) at and near cell borders; mmdetection trains with it.
    """
    step = (1 / size.double()).float()  # [n]
    return torch.trunc(position / extent / step).long()  # [3, 2, n]
