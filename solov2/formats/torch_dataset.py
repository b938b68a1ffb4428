"""A dataset in Python, of (image, instances): what a `torch.utils.data.Dataset` for detection usually yields.

An item is an image, in any form that `SOLOv2.predict` takes, and a mapping with

    masks    uint8 or bool [N, H, W], tensor or array
    labels   int64 [N], positions in the dataset's `class_names` (or `classes`)
    iscrowd  [N], optional: 1 for a region of many objects

as in torchvision's detection references, whose other entries ("boxes", "image_id", "area") are not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from solov2.data.image_dataset import item_image
from solov2.errors import InputError, count
from solov2.formats.annotated import AnnotatedImage, Losses, Reading, add_instance
from solov2.ops.masks import encode_rle

Entry = tuple[tuple[int, int], list[tuple[int, dict[str, Any], bool]]]  # (h, w), its (label, RLE, is crowd)


def read(dataset: Dataset, place: Path, *, split: str | None = None, workers: int = 0) -> Reading:
    """The annotations of every item, each of which is asked for once.

    Args:
        dataset: has a length; an index always has the same image and instances.
        place: folder that stands in for the image folder; the file names of the images are their indices.
        split: "train" or "val", of all items; None leaves the division to the caller.
        workers: processes that ask for items.

    Raises:
        InputError: the dataset has no length or no class names, or an item is malformed; the message names the item.
    """
    names = class_names_of(dataset)
    reading = Reading(place, place, names, [], Losses())
    entries = DataLoader(_Entries(dataset, len(names)), batch_size=None, num_workers=workers)
    for index, result in enumerate(entries):
        if isinstance(result, str):  # an exception in a worker would lose its type
            raise InputError(result)
        (height, width), instances = result
        image = AnnotatedImage(str(index), height, width, split=split)
        for label, rle, crowd in instances:
            add_instance(image, names[label], rle, f"item {index}", reading.losses, crowd=crowd)
        reading.images.append(image)
    return reading


def class_names_of(dataset: Any) -> list[str]:
    """The attribute `class_names` or `classes` of a dataset, or of the one that it wraps, such as `Subset`.

    Raises:
        InputError: there is none, or the dataset has no length.
    """
    kind = type(dataset).__name__
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(f"the dataset ({kind}) needs __len__ and __getitem__: training visits its items in any order")
    inner = dataset
    while inner is not None:
        for name in ("class_names", "classes"):
            names = getattr(inner, name, None)
            if isinstance(names, (list, tuple)) and names and all(isinstance(x, str) for x in names):
                return list(names)
        inner = getattr(inner, "dataset", None)
    raise InputError(f"the dataset ({kind}) needs an attribute class_names, a list of strings that its labels count")


class _Entries(Dataset):
    """The size and the encoded instances of each item, or what is wrong with it."""

    def __init__(self, dataset: Any, num_classes: int) -> None:
        self.dataset, self.num_classes = dataset, num_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Entry | str:
        try:
            return self._entry(index)
        except InputError as error:
            return str(error)

    def _entry(self, index: int) -> Entry:
        image, target = item_image(self.dataset, index)
        size = (image.shape[1], image.shape[2])
        if not isinstance(target, Mapping) or not {"masks", "labels"} <= target.keys():
            keys = (
                f"a mapping with {', '.join(map(str, target))}"
                if isinstance(target, Mapping)
                else type(target).__name__
            )
            raise InputError(
                f"item {index} of the dataset: its instances must be a mapping with masks and labels, not {keys}"
            )
        masks, labels = (torch.as_tensor(_array(target[name])) for name in ("masks", "labels"))
        crowds = torch.as_tensor(_array(target.get("iscrowd", torch.zeros(len(labels)))))
        if masks.numel() == 0 and labels.numel() == 0:
            return size, []
        if masks.ndim != 3 or tuple(masks.shape[1:]) != size or not len(masks) == len(labels) == len(crowds):
            raise InputError(
                f"item {index} of the dataset: masks must have the shape [{len(labels)}, {size[0]}, {size[1]}] of its "
                f"{count(len(labels), 'label')} and its image, not {list(masks.shape)}"
            )
        wrong = [label for label in labels.tolist() if label not in range(self.num_classes)]
        if wrong:
            raise InputError(
                f"item {index} of the dataset: label {wrong[0]} is not in 0..{self.num_classes - 1}, the positions in "
                "its class_names"
            )
        return size, list(zip(map(int, labels.tolist()), encode_rle(masks > 0), map(bool, crowds.tolist())))


def _array(values: Any) -> Any:
    return values.cpu() if isinstance(values, torch.Tensor) else np.asarray(values)
