"""Transforms of samples (described in data/coco.py and data/panoptic.py). Pixels and masks stay uint8 throughout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from solov2.compute import span
from solov2.data.augment import Window, jitter_colors, paste_sample, random_window
from solov2.data.image_dataset import ImageDataset
from solov2.ops.mask_map import Masks
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


def _resize_masks(masks: Masks, size: tuple[int, int]) -> Masks:
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


def crop_sample(sample: Sample, window: Window) -> Sample:
    """The part of a sample in a window; boxes are clipped, and `original_size` stays that of the whole image."""
    top, left, height, width = window
    rows, columns = slice(top, top + height), slice(left, left + width)
    semantic = {"semantic": sample["semantic"][rows, columns]} if "semantic" in sample else {}
    boxes = sample["boxes"] - sample["boxes"].new_tensor([left, top, left, top])
    return {
        **sample,
        **semantic,
        **{key: _crop_masks(sample[key], rows, columns) for key in MASKS if key in sample},
        "image": sample["image"][:, rows, columns],
        "boxes": boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height])),
    }


def _crop_masks(masks: Masks, rows: slice, columns: slice) -> Masks:
    return masks[:, rows, columns] if isinstance(masks, Tensor) else masks.crop(rows, columns)


def keep_instances(sample: Sample, keep: Tensor) -> Sample:
    """The sample with only those of its N instances where `keep`, bool [N], is True."""
    return {**sample, **{key: sample[key][keep] for key in ("boxes", "labels", "masks")}}


def drop_flat_instances(sample: Sample) -> Sample:
    """Drop instances whose box has no area."""
    boxes = sample["boxes"]
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return sample if keep.all() else keep_instances(sample, keep)


class TrainTransform:
    """Random scale, then random flip (mmdetection's pipeline for SOLOv2); with more settings, random crops and colors.

    A crop has the shape of its image, and a factor above 1 is a crop before resizing: no sample is larger than without
    them, and its shape group stays.

    Args:
        scales: short edges in pixels; one is drawn per sample.
        max_size: limit of the long edge in pixels; it takes precedence over the short edge.
        flip_probability: of the horizontal flip.
        dihedral: also flip vertically and transpose, each with probability 0.5; for images without an upright
            direction, such as aerial or microscope images.
        color_jitter: strengths of the random changes of brightness, contrast, saturation and hue (`jitter_colors`).
        crop_share: minimum and maximum of the share of the image's area that is kept (Szegedy et al. 2015).
        scale_jitter: minimum and maximum of a factor on the size (large-scale jitter, arXiv 2012.07177). What exceeds
            the size without it is cut off at random.
    """

    def __init__(
        self,
        *,
        scales: Sequence[int],
        max_size: int,
        flip_probability: float = 0.5,
        dihedral: bool = False,
        color_jitter: Sequence[float] = (0, 0, 0, 0),
        crop_share: tuple[float, float] = (1, 1),
        scale_jitter: tuple[float, float] = (1, 1),
    ) -> None:
        self.scales, self.max_size = tuple(scales), max_size
        self.flip_probability, self.dihedral = flip_probability, dihedral
        self.color_jitter, self.crop_share, self.scale_jitter = color_jitter, crop_share, scale_jitter

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """The transformed sample, without instances whose box has no area left."""
        scale, horizontal, vertical, transpose = torch.rand(4, generator=generator).tolist()
        share, top, left, factor, *colors = torch.rand(8, generator=generator).tolist()  # after those above
        factor = _between(self.scale_jitter, factor)
        side = math.sqrt(_between(self.crop_share, share)) / max(1, factor)
        if side < 1:
            whole = tuple(sample["image"].shape[1:])
            limit = (max(1, round(side * whole[0])), max(1, round(side * whole[1])))
            sample = crop_sample(sample, random_window(whole, limit, (top, left)))
        short = self.scales[int(scale * len(self.scales))]
        size = resized_size(tuple(sample["image"].shape[1:]), long=self.max_size, short=short)
        if factor < 1:
            size = (max(1, round(factor * size[0])), max(1, round(factor * size[1])))
        enlarges = math.prod(size) > sample["image"][0].numel()
        if enlarges:  # colors are changed where there are fewer pixels
            sample = self._jitter_colors(sample, colors)
        sample = drop_flat_instances(resize_sample(sample, size))
        if not enlarges:
            sample = self._jitter_colors(sample, colors)
        sample = flip_sample(
            sample, horizontal=horizontal < self.flip_probability, vertical=self.dihedral and vertical < 0.5
        )
        return transpose_sample(sample) if self.dihedral and transpose < 0.5 else sample

    def _jitter_colors(self, sample: Sample, draws: Sequence[float]) -> Sample:
        return {**sample, "image": jitter_colors(sample["image"], self.color_jitter, draws)}


def _between(bounds: tuple[float, float], draw: float) -> float:
    """The number that `draw`, in [0, 1), selects between two bounds."""
    return bounds[0] + draw * (bounds[1] - bounds[0])


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

    Args:
        dataset: of instance data if `copy_paste` is not 0.
        transform: called with a sample and the generator of its position.
        seed: of all randomness.
        copy_paste: probability of pasting instances of another, equally transformed image: each with probability 0.5,
            all at the same random offset (Ghiasi et al., arXiv 2012.07177, without blending).
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[[Sample, torch.Generator], Sample],
        *,
        seed: int,
        copy_paste: float = 0,
    ) -> None:
        self.dataset, self.transform, self.seed, self.copy_paste = dataset, transform, seed, copy_paste

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int, int]) -> Sample:
        """The transformed sample at `index`."""
        index, epoch, position = (index, 0, index) if isinstance(index, int) else index
        sample = self.dataset[index]
        with span("transform"):
            sample = self.transform(sample, seeded_generator(self.seed, epoch, position))
        if not self.copy_paste:
            return sample
        generator = seeded_generator(self.seed, epoch, position, 1)  # of its own: samples differ by what is pasted only
        paste, other, *place = torch.rand(4, generator=generator).tolist()
        if paste >= self.copy_paste:
            return sample
        source = self.dataset[int(other * len(self))]
        with span("transform"):
            return _paste(sample, self.transform(source, generator), generator, place)


def _paste(sample: Sample, source: Sample, generator: torch.Generator, place: Sequence[float]) -> Sample:
    """Paste a random half of the instances of `source`; `place` are two numbers in [0, 1), for top and left."""
    chosen = torch.rand(len(source["labels"]), generator=generator) < 0.5
    size, source_size = (tuple(each["image"].shape[1:]) for each in (sample, source))
    source = keep_instances(source, chosen)
    # Along each axis, the shorter of the two moves along the longer.
    source = drop_flat_instances(crop_sample(source, random_window(source_size, size, place)))
    return paste_sample(sample, source, random_window(size, source_size, place)[:2])


def seeded_generator(*values: int) -> torch.Generator:
    """A CPU generator seeded with a 64-bit hash of the values, so that neighboring values give unrelated streams."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
