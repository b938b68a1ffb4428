"""The base class of the datasets of annotated images: reads images, checks their size, and handles broken ones."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from solov2.compute import span
from solov2.data.annotations import ImageId, ImageRecord, require_folder
from solov2.errors import InputError
from solov2.ops.images import read_image, to_rgb_tensor

LOG = logging.getLogger(__name__)
Box = tuple[float, float, float, float]


class ImageDataset(Dataset, ABC):
    """Images of one annotation file; `CocoInstances` and `CocoPanoptic` say what is annotated.

    Args:
        annotations: path of the JSON file.
        images: the folder that `file_name` is relative to.
        training: whether samples have instances.
        skip_broken_images: instead of an image that cannot be read, return the next readable sample and warn.
        max_pixels: maximum width x height of an image; larger ones are rejected.
        decode_masks: False gives masks that are only drawn at the size of the targets.
        source: a user's dataset of (image, instances) that has the images, instead of the folder; the file name of an
            image is then its index.

    Attributes:
        class_names: of the instances, in order of category id; a label is an index into this list.
        category_ids: the file's category id of each label.
        stuff_names, stuff_category_ids: the same of the stuff classes, by stuff label; none in instance data.
        image_ids, aspect_ratios: id and width / height of each image, in dataset order.
        unknown_categories: category ids that are not in `categories` -> number of annotations with that id.
    """

    class_names: list[str]
    category_ids: list[int]
    stuff_names: list[str]
    stuff_category_ids: list[int]
    image_ids: list[ImageId]
    aspect_ratios: list[float]

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        training: bool,
        skip_broken_images: bool,
        max_pixels: int,
        decode_masks: bool,
        source: Dataset | None = None,
    ) -> None:
        self.annotation_file, self.image_root = Path(annotations), Path(images)
        self.training, self.skip_broken_images, self.decode_masks = training, skip_broken_images, decode_masks
        self.max_pixels, self.source = max_pixels, source
        self.stuff_names, self.stuff_category_ids = [], []
        self.unknown_categories: Counter[int] = Counter()
        self._warned: set[str] = set()
        require_folder(self.image_root)

    @abstractmethod
    def record(self, position: int) -> ImageRecord:
        """What the annotation file says about the image at a position."""

    @abstractmethod
    def boxes(self, position: int) -> list[tuple[Box, int]]:
        """(box xyxy, label) of the instances of the image at a position; in training only."""

    @abstractmethod
    def has_ground_truth(self) -> bool:
        """Whether any annotation counts in evaluation."""

    def files(self) -> list[tuple[str, Path, list[str], str]]:
        """What the dataset reads: (noun, folder, names inside it, flag that names the folder); none with `source`."""
        if self.source is not None:
            return []
        names = [self.record(position).file_name for position in range(len(self))]
        return [("image", self.image_root, names, "--val-images")]

    @abstractmethod
    def _load(self, position: int) -> dict[str, Any]:
        """The sample at a position."""

    def file_name(self, image_id: ImageId) -> str:
        """The file name of an image, relative to the image folder."""
        return self.record(self.image_ids.index(image_id)).file_name

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at `index`; with `skip_broken_images`, the next one that can be read."""
        start = range(len(self))[index]  # raises IndexError if out of range
        for step in range(len(self)):
            try:
                return self._load((start + step) % len(self))
            except InputError as error:
                if not self.skip_broken_images:
                    raise
                self._warn_once(str(error))
        raise InputError(f"no image of {self.annotation_file} in {self.image_root} can be read")

    def instance_table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All training instances without their masks; no file is read.

        Returns:
            position of the image in the dataset int64 [N], label int64 [N], box float64 [N, 4] (xyxy, image pixels).
        """
        rows = [
            (position, label, *box)
            for position in range(len(self) if self.training else 0)
            for box, label in self.boxes(position)
        ]
        table = np.array(rows, dtype=np.float64).reshape(-1, 6)
        return table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:]

    def image_sizes(self) -> np.ndarray:
        """(h, w) of each image according to the annotation file, int64 [images, 2]."""
        records = [self.record(position) for position in range(len(self))]
        return np.array([(record.height, record.width) for record in records], dtype=np.int64)

    def image(self, position: int) -> Tensor:
        """The image at a position as it is stored: uint8 [3, H, W], RGB.

        Raises:
            InputError: it is missing, damaged, or not of the stated size.
        """
        return self._read_image(self.record(position))

    def _read_image(self, record: ImageRecord) -> Tensor:
        if self.source is not None:
            image, _ = item_image(self.source, int(record.file_name))
            if tuple(image.shape[1:]) != (record.height, record.width):
                raise InputError(
                    f"item {record.file_name} of the dataset is {image.shape[2]} x {image.shape[1]}, but was "
                    f"{record.width} x {record.height} when its annotations were read into {self.annotation_file}"
                )
            return image
        path = self.image_root / record.file_name
        stated = f"{self.annotation_file} says {record.width} x {record.height}"
        try:
            with span("decode"):
                image = read_image(path, apply_exif=False, max_pixels=self.max_pixels)
        except InputError as error:
            raise InputError(f"{error} ({stated})") from error
        height, width = image.shape[1:]
        if (height, width) != (record.height, record.width):
            turned = (width, height) == (record.height, record.width)
            hint = "; EXIF rotation is not applied to dataset images" if turned else ""
            raise InputError(f"image {path} is {width} x {height}, but {stated}{hint}")
        return image

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            LOG.warning("%s; the next image is used instead", message)


def item_image(dataset: Any, index: int) -> tuple[Tensor, Any]:
    """(image uint8 [3, H, W] in RGB, instances as they are) of an item of a user's dataset.

    Raises:
        InputError: the item is no pair that begins with an image; the message names it.
    """
    try:
        item = dataset[index]
    except IndexError as error:
        raise InputError(f"item {index} of the dataset does not exist any more: {error}") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise InputError(f"item {index} of the dataset must be (image, instances), not {type(item).__name__}")
    try:
        return to_rgb_tensor(item[0]), item[1]
    except (InputError, TypeError) as error:
        raise InputError(f"item {index} of the dataset: {error}") from error
