"""Augmentations of training samples beyond sizes and flips; all of them are off by default.

Every function is pure: its randomness comes in as numbers in [0, 1). Sources: color jitter, Krizhevsky et al. 2012 and
torchvision's `ColorJitter`; copy-paste, Ghiasi et al., arXiv 2012.07177.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.mask_map import Masks
from solov2.ops.masks import masks_to_boxes, rle_from_columns

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
    return image.mul(float(factor)).add_((1 - factor) * mean).clamp_(0, 255).to(torch.uint8)


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
    cover = np.zeros(size, dtype=bool)
    pasted, visible = list[dict[str, Any]](), list[bool]()
    for mask, (top, left) in _windows(source["masks"]):
        place = (top + corner[0], left + corner[1])
        _part(cover, mask, place)[:] |= mask
        pasted.append(rle_from_columns(mask.T, place, size)[0])
        visible.append(bool(mask.any()))
    if not any(visible):
        return sample
    behind, boxes, left_over = _hide(sample["masks"], sample["boxes"], cover)
    kept = torch.tensor([*left_over, *visible])
    shifted = source["boxes"] + torch.tensor([*corner[::-1], *corner[::-1]])
    ignored = {}
    if "ignored" in sample:
        rles, _, _ = _hide(sample["ignored"], torch.zeros(len(sample["ignored"]), 4), cover)
        ignored["ignored"] = EncodedMasks.from_segmentations(rles, size)
    image = sample["image"].clone()
    rows, columns = slice(corner[0], corner[0] + height), slice(corner[1], corner[1] + width)
    np.copyto(image[:, rows, columns].numpy(), source["image"].numpy(), where=cover[rows, columns])
    return {
        **sample,
        **ignored,
        "image": image,
        "boxes": torch.cat([boxes, shifted])[kept],
        "labels": torch.cat([sample["labels"], source["labels"]])[kept],
        "masks": EncodedMasks.from_segmentations([*behind, *pasted], size)[kept],
    }


def _hide(masks: Masks, boxes: Tensor, cover: np.ndarray) -> tuple[list[dict[str, Any]], Tensor, list[bool]]:
    """N masks without the pixels under `cover`, bool [h, w].

    Returns:
        N RLEs; boxes [N, 4], those of the visible part where something was hidden; whether any pixel is left, N times.
    """
    rles, boxes, left_over = list[dict[str, Any]](), boxes.clone(), list[bool]()
    for (mask, corner), box in zip(_windows(masks), boxes, strict=True):
        hidden = mask & _part(cover, mask, corner)
        rle, tight = rle_from_columns((mask & ~hidden).T, corner, cover.shape)
        if hidden.any():
            box[:] = torch.tensor(tight)
        rles.append(rle)
        left_over.append(tight[2] > 0)
    return rles, boxes, left_over


def _windows(masks: Masks) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Each mask, bool, in a window outside of which it is 0, and the (top, left) of this window."""
    for planes, extents in ((masks, masks_to_boxes(masks).long()),) if isinstance(masks, Tensor) else masks.chunks():
        for plane, (x1, y1, x2, y2) in zip(planes.numpy().view(bool), extents.tolist(), strict=True):
            yield plane[y1:y2, x1:x2], (y1, x1)


def _part(cover: np.ndarray, mask: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    """The pixels of `cover` under a window of the shape of `mask` at a corner (top, left)."""
    return cover[corner[0] : corner[0] + mask.shape[0], corner[1] : corner[1] + mask.shape[1]]
