"""Transforms of samples (described in data/coco.py and data/panoptic.py). Pixels and masks stay uint8 throughout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from solov2.compute import span
from solov2.data.image_dataset import ImageDataset
from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.mask_map import MaskMap
from solov2.ops.resize import resize_image, resize_map, resize_masks, resized_size

Sample = dict[str, Any]
MASKS = ("masks", "ignored")  # entries that are masks


def resize_sample(sample: Sample, size: tuple[int, int]) -> Sample:
    """Resize to `size` (h, w): image bilinearly, masks by nearest neighbor; boxes are scaled and clipped."""
    semantic = {"semantic": resize_map(sample["semantic"], size)} if "semantic" in sample else {}
    return {
        **sample,
        **semantic,
        **{key: _resize_masks(sample[key], size) for key in MASKS if key in sample},
        "image": resize_image(sample["image"], size),
        "boxes": resize_boxes(sample["boxes"], tuple(sample["image"].shape[1:]), size),
    }


def _resize_masks(masks: Tensor | EncodedMasks | MaskMap, size: tuple[int, int]) -> Tensor | EncodedMasks | MaskMap:
    return resize_masks(masks, size) if isinstance(masks, Tensor) else masks.resize(size)


def resize_boxes(boxes: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Scale boxes [N, 4] xyxy of an image of `size` (h, w) to `new_size`, and clip them to it."""
    factors = boxes.new_tensor([new_size[1] / size[1], new_size[0] / size[0]]).repeat(2)
    limits = boxes.new_tensor([new_size[1], new_size[0]]).repeat(2)
    return (boxes * factors).clamp(min=0).minimum(limits)


def flip_sample(sample: Sample, *, horizontal: bool, vertical: bool) -> Sample:
    """Mirror left to right (`horizontal`), top to bottom (`vertical`), or both."""
    dims = [dim for dim, wanted in ((1, vertical), (2, horizontal)) if wanted]
    if not dims:
        return sample
    size = tuple(sample["image"].shape[1:])
    semantic = {"semantic": sample["semantic"].flip([dim - 1 for dim in dims])} if "semantic" in sample else {}
    return {
        **sample,
        **semantic,
        **{key: sample[key].flip(dims) for key in MASKS if key in sample},
        "image": sample["image"].flip(dims),
        "boxes": _flip_boxes(sample["boxes"], size, horizontal=horizontal, vertical=vertical),
    }


def _flip_boxes(boxes: Tensor, size: tuple[int, int], *, horizontal: bool, vertical: bool) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(1)
    if horizontal:
        x1, x2 = size[1] - x2, size[1] - x1
    if vertical:
        y1, y2 = size[0] - y2, size[0] - y1
    return torch.stack((x1, y1, x2, y2), dim=1)


def transpose_sample(sample: Sample) -> Sample:
    """Mirror across the main diagonal: rows become columns, and `original_size` is swapped too."""
    semantic = {"semantic": sample["semantic"].mT} if "semantic" in sample else {}
    return {
        **sample,
        **semantic,
        **{key: sample[key].mT for key in MASKS if key in sample},
        "image": sample["image"].mT,
        "boxes": sample["boxes"][:, [1, 0, 3, 2]],
        "original_size": sample["original_size"][::-1],
    }


def drop_flat_instances(sample: Sample) -> Sample:
    """Drop instances whose box has no area."""
    boxes = sample["boxes"]
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if keep.all():
        return sample
    return {**sample, **{key: sample[key][keep] for key in ("boxes", "labels", "masks")}}


class TrainTransform:
    """Random scale, then random flip (mmdetection's pipeline for SOLOv2).

    Args:
        scales: short edges in pixels; one is drawn per sample.
        max_size: limit of the long edge in pixels; it takes precedence over the short edge.
        flip_probability: of the horizontal flip.
        dihedral: also flip vertically and transpose, each with probability 0.5; for images without an upright
            direction, such as aerial or microscope images.
    """

    def __init__(
        self, *, scales: Sequence[int], max_size: int, flip_probability: float = 0.5, dihedral: bool = False
    ) -> None:
        self.scales, self.max_size = tuple(scales), max_size
        self.flip_probability, self.dihedral = flip_probability, dihedral

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """The transformed sample, without instances whose box has no area left."""
        scale, horizontal, vertical, transpose = torch.rand(4, generator=generator).tolist()
        short = self.scales[int(scale * len(self.scales))]
        size = resized_size(tuple(sample["image"].shape[1:]), long=self.max_size, short=short)
        sample = drop_flat_instances(resize_sample(sample, size))
        sample = flip_sample(
            sample, horizontal=horizontal < self.flip_probability, vertical=self.dihedral and vertical < 0.5
        )
        return transpose_sample(sample) if self.dihedral and transpose < 0.5 else sample


class EvalTransform:
    """Resize to the largest size with long edge <= `long` and short edge <= `short` pixels."""

    def __init__(self, *, short: int, long: int) -> None:
        self.short, self.long = short, long

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        """The resized sample; `generator` is unused."""
        size = tuple(sample["image"].shape[1:])
        return resize_sample(sample, resized_size(size, long=self.long, short=self.short))


class TransformedDataset(Dataset):
    """A dataset with a transform whose randomness depends only on (seed, epoch, position).

    Samples are therefore the same for any number of workers or ranks, and in a resumed run. An index is (index into
    `dataset`, epoch, position in the epoch); a plain integer i means (i, 0, i).
    """

    def __init__(
        self, dataset: ImageDataset, transform: Callable[[Sample, torch.Generator], Sample], *, seed: int
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int, int]) -> Sample:
        """The transformed sample at `index`."""
        index, epoch, position = (index, 0, index) if isinstance(index, int) else index
        sample = self.dataset[index]
        with span("transform"):
            return self.transform(sample, seeded_generator(self.seed, epoch, position))


def seeded_generator(*values: int) -> torch.Generator:
    """A CPU generator seeded with a 64-bit hash of the values, so that neighboring values give unrelated streams."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
