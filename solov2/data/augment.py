"""Augmentations of training samples beyond sizes and flips; all of them are off by default.

Every function is pure: its randomness comes in as numbers in [0, 1). Sources: color jitter, Krizhevsky et al. 2012 and
torchvision's `ColorJitter`; copy-paste, Ghiasi et al., arXiv 2012.07177.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.mask_map import MaskMap
from solov2.ops.masks import encode_rle, masks_to_boxes

Window = tuple[int, int, int, int]  # top, left, height, width in pixels


def jitter_colors(image: Tensor, strengths: Sequence[float], draws: Sequence[float]) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order.

    Args:
        image: uint8 [3, H, W], RGB.
        strengths: of the four; s gives a factor from 1 - s to 1 + s, for the hue a rotation by -s to s turns.
        draws: four numbers in [0, 1).

    Returns:
        uint8 [3, H, W]; a strength of 0 changes nothing.
    """
    changes = (TF.adjust_brightness, _adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for change, neutral, strength, draw in zip(changes, (1, 1, 1, 0), strengths, draws, strict=True):
        if strength:
            image = change(image, neutral + strength * (2 * draw - 1))
    return image


def _adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """torchvision's `adjust_contrast` with an exact mean: the sum of float32 depends on the number of threads."""
    gray = TF.rgb_to_grayscale(image)
    mean = int(gray.sum()) / gray.numel()
    return image.mul(factor).add_((1 - factor) * mean).clamp_(0, 255).to(torch.uint8)


def random_window(size: tuple[int, int], limit: tuple[int, int], draws: Sequence[float]) -> Window:
    """A random window of an image of `size` (h, w), as large as it can be within `limit` (h, w).

    `draws` are two numbers in [0, 1), for top and left.
    """
    height, width = min(size[0], limit[0]), min(size[1], limit[1])
    return int(draws[0] * (size[0] - height + 1)), int(draws[1] * (size[1] - width + 1)), height, width


def paste_sample(sample: dict[str, Any], source: dict[str, Any], corner: tuple[int, int]) -> dict[str, Any]:
    """Paste all instances of another sample in front of those of this one, without blending.

    Of the instances behind, a hidden one is dropped, and a partly hidden one gets the box of its visible part. Ignored
    masks lose what is pasted onto them.

    Args:
        sample, source: of instance data (see `solov2.data.coco`).
        corner: (top, left) of the source in the sample, where all of it has room.

    Returns:
        A sample of the same size, whose masks are `EncodedMasks`; `sample` itself if no pixel is pasted.
    """
    size, (height, width) = tuple(sample["image"].shape[1:]), source["image"].shape[1:]
    rows, columns = slice(corner[0], corner[0] + height), slice(corner[1], corner[1] + width)
    cover = torch.zeros(size, dtype=torch.bool)
    pasted, used = list[dict[str, Any]](), list[Tensor]()
    for planes in _drawn(source["masks"]):
        whole = torch.zeros(len(planes), *size, dtype=torch.uint8)
        whole[:, rows, columns] = planes
        cover |= whole.bool().any(0)
        pasted += encode_rle(whole)
        used.append(planes.bool().flatten(1).any(1))
    if not cover.any():
        return sample
    behind, boxes, visible = _hide(sample["masks"], sample["boxes"], cover)
    ignored = {}
    if "ignored" in sample:
        parts = sample["ignored"]
        ignored["ignored"] = EncodedMasks.from_segmentations(_hide(parts, torch.zeros(len(parts), 4), cover)[0], size)
    kept, shifted = torch.cat([visible, *used]), source["boxes"] + torch.tensor([*corner[::-1], *corner[::-1]])
    image = sample["image"].clone()
    inside = image[:, rows, columns]
    inside.copy_(torch.where(cover[rows, columns], source["image"], inside))
    return {
        **sample,
        **ignored,
        "image": image,
        "boxes": torch.cat([boxes, shifted])[kept],
        "labels": torch.cat([sample["labels"], source["labels"]])[kept],
        "masks": EncodedMasks.from_segmentations([*behind, *pasted], size)[kept],
    }


def _hide(
    masks: Tensor | EncodedMasks | MaskMap, boxes: Tensor, cover: Tensor
) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Masks without the pixels under `cover`, bool [h, w].

    Returns:
        N RLEs; boxes [N, 4], those of the visible part where something was hidden; bool [N], whether any pixel is left.
    """
    rles, tight, changed = list[dict[str, Any]](), [boxes[:0]], list[Tensor]()
    for planes in _drawn(masks):
        left = planes * ~cover
        rles += encode_rle(left)
        tight.append(masks_to_boxes(left))
        changed.append((left != planes).flatten(1).any(1))
    found = torch.cat(tight)
    return rles, torch.where(torch.cat(changed)[:, None], found, boxes), found[:, 2] > 0


def _drawn(masks: Tensor | EncodedMasks | MaskMap) -> Iterable[Tensor]:
    """Masks as planes, uint8 [n, h, w], a few at a time."""
    return (masks,) if isinstance(masks, Tensor) else (planes for planes, _ in masks.chunks())
