"""COCO instance annotations as a data set of samples.

sample  image u8[3,H,W] RGB | boxes f32[N,4] xyxy | labels i64[N] | masks u8[N,H,W] | extents i64[N,4] xyxy, outside of
        which the masks are 0, so that nobody has to look there | image_id int | original_size (h, w)

Which annotations become instances follows mmdetection (its `CocoDataset.parse_data_info`); width and height of the JSON
decide, and EXIF rotation is not applied, because annotations are drawn on the stored pixels.
"""

from __future__ import annotations

import contextlib
import io
import json
import marshal
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from solov2.config import InputError
from solov2.ops.images import read_image
from solov2.ops.masks import check_segmentation, segmentations_to_masks


class ImageRecord(NamedTuple):
    """What the annotation file says of one image."""

    image_id: int
    file_name: str
    height: int
    width: int


class CocoInstances(Dataset):
    """Images and instances of one COCO annotation file.

    Args:
        annotations: the JSON file.
        images: the folder that `file_name` is relative to.
        training: True gives images with their usable instances; False gives every image alone (N = 0).
        keep_empty: in training, keep images without a usable instance.
        min_size: in training, leave out images whose shorter edge is below this many pixels.
        skip_broken_images: return the next readable sample instead of an image that cannot be read, and warn.

    Attributes:
        class_names: names in order of category id; a label is an index into it.
        category_ids: the file's own id of each label.
        image_ids, aspect_ratios: id and width / height of each image, in the order of the data set.

    Raises:
        InputError: at construction for a file that is missing, not COCO, or broken in a way that would stop training
            or evaluation later; on reading for an image that is missing, damaged, or not of the size stated.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        training: bool,
        keep_empty: bool = False,
        min_size: int = 32,
        skip_broken_images: bool = False,
    ) -> None:
        self.annotation_file, self.image_root = Path(annotations), Path(images)
        self.training, self.skip_broken_images = training, skip_broken_images
        self._warned: set[str] = set()
        if not self.image_root.is_dir():
            raise InputError(f"image folder {self.image_root} does not exist")
        content = read_annotations(self.annotation_file)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids: list[int] = [category["id"] for category in categories]
        self.class_names: list[str] = [category["name"] for category in categories]
        records = [ImageRecord(x["id"], x["file_name"], int(x["height"]), int(x["width"])) for x in content["images"]]
        instances = self._collect_instances(content["annotations"], {record.image_id: record for record in records})
        if training:
            records = [
                record
                for record in records
                if min(record.height, record.width) >= min_size and (keep_empty or instances[record.image_id])
            ]
        if not records:
            raise InputError(
                f"{self.annotation_file} has no usable image: training needs one of at least {min_size} pixels with an "
                "instance that is in `categories`, not a crowd, of positive area and inside the image"
            )
        self.image_ids = [record.image_id for record in records]
        self.aspect_ratios = [record.width / record.height for record in records]
        # One block of bytes instead of millions of objects: worker processes share it, where touching the reference
        # counts of objects would copy all annotations into each of them. (marshal: plain values, read back here only.)
        packed = [marshal.dumps((tuple(record), instances[record.image_id])) for record in records]
        self._packed, self._offsets = b"".join(packed), np.cumsum([0, *map(len, packed)])
        self._coco = None if training else _index(content)

    @property
    def coco(self) -> COCO:
        """The annotation file as pycocotools has it, for evaluation; in training it is read again on first use."""
        if self._coco is None:
            self._coco = _index(read_annotations(self.annotation_file))
        return self._coco

    def file_name(self, image_id: int) -> str:
        """What the annotation file calls an image, relative to the image folder."""
        return self._records[self.image_ids.index(image_id)].file_name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coco": None}  # workers never need it

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at `index`; with `skip_broken_images`, the next one that can be read."""
        start = range(len(self))[index]  # IndexError where it is out of range
        for step in range(len(self)):
            try:
                return self._load((start + step) % len(self))
            except InputError as error:
                if not self.skip_broken_images:
                    raise
                self._warn_once(str(error))
        raise InputError(f"no image of {self.annotation_file} in {self.image_root} can be read")

    def _load(self, position: int) -> dict[str, Any]:
        values, instances = marshal.loads(self._packed[slice(*self._offsets[position : position + 2])])
        record = ImageRecord(*values)
        size = (record.height, record.width)
        masks, extents = segmentations_to_masks([segmentation for _, _, segmentation in instances], size)
        return {
            "image": self._read_image(record),
            "boxes": torch.tensor([box for box, _, _ in instances], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for _, label, _ in instances], dtype=torch.int64),
            "masks": masks,
            "extents": extents,
            "image_id": record.image_id,
            "original_size": size,
        }

    def _read_image(self, record: ImageRecord) -> Tensor:
        path = self.image_root / record.file_name
        stated = f"{self.annotation_file} says {record.width} x {record.height}"
        try:
            image = read_image(path, apply_exif=False)
        except InputError as error:
            raise InputError(f"{error} ({stated})") from error
        height, width = image.shape[1:]
        if (height, width) != (record.height, record.width):
            turned = (width, height) == (record.height, record.width)
            hint = "; EXIF rotation is not applied to data-set images" if turned else ""
            raise InputError(f"image {path} is {width} x {height}, but {stated}{hint}")
        return image

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"{message}; the next image is used instead", stacklevel=3)

    def _collect_instances(self, annotations: list[dict], records: dict[int, ImageRecord]) -> dict[int, list[tuple]]:
        """(box xyxy, label, segmentation) of each usable annotation by image id, after a check of all that matter.

        Evaluation hands every annotation to pycocotools, crowds too, so there all of them are checked.
        """
        labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        instances: dict[int, list[tuple]] = {image_id: [] for image_id in records}
        unknown = []
        for annotation in annotations:
            record = records[annotation["image_id"]]
            label = labels.get(annotation["category_id"])
            if label is None:
                unknown.append(annotation)
                continue
            usable = is_usable(annotation, record)
            if usable or not self.training:
                try:
                    check_segmentation(annotation.get("segmentation"), (record.height, record.width))
                except InputError as error:
                    raise InputError(f"annotation {annotation['id']} of {self.annotation_file}: {error}") from error
            if usable and self.training:
                x, y, width, height = annotation["bbox"]
                box = (x, y, x + width, y + height)
                instances[record.image_id].append((box, label, annotation["segmentation"]))
        if unknown:
            first = unknown[0]
            warnings.warn(
                f"{len(unknown)} annotations of {self.annotation_file} have a category_id that is not in "
                f"`categories` and are left out, the first is annotation {first['id']} with category "
                f"{first['category_id']}",
                stacklevel=3,
            )
        return instances


def is_usable(annotation: dict[str, Any], record: ImageRecord) -> bool:
    """Whether an annotation becomes a training instance: no crowd, positive area, 1 pixel or more, inside the image."""
    x, y, width, height = annotation["bbox"]
    overlap_x = min(x + width, record.width) - max(x, 0)
    overlap_y = min(y + height, record.height) - max(y, 0)
    large = annotation["area"] > 0 and width >= 1 and height >= 1
    return large and overlap_x > 0 and overlap_y > 0 and not annotation["iscrowd"]


def read_annotations(path: Path) -> dict[str, Any]:
    """A COCO annotation file whose ids, references, file names and numbers have been checked.

    `iscrowd` is filled in with 0 where it is missing (pycocotools' evaluation needs it). Segmentations are not checked.

    Raises:
        InputError: naming the file and the image, annotation or category.
    """
    if not path.is_file():
        raise InputError(f"annotation file {path} does not exist")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"annotation file {path} is not JSON, it may be truncated ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"annotation file {path} has no list `{key}`, so it is not in COCO's instance format")
    image_ids = _unique_ids(content["images"], "image", path)
    _unique_ids(content["annotations"], "annotation", path)
    _unique_ids(content["categories"], "category", path)
    for image in content["images"]:
        _check_image(image, path)
    for category in content["categories"]:
        if not isinstance(category.get("name"), str):
            raise InputError(f"category {category['id']} of {path} has no name")
    for annotation in content["annotations"]:
        _check_annotation(annotation, image_ids, path)
        annotation.setdefault("iscrowd", 0)
    return content


def _unique_ids(entries: Iterable[Any], kind: str, path: Path) -> set[int]:
    ids: set[int] = set()
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
            raise InputError(f"{path} has a {kind} without an integer id: {str(entry)[:80]}")
        if entry["id"] in ids:
            raise InputError(f"{path} has the {kind} id {entry['id']} twice")
        ids.add(entry["id"])
    return ids


def _check_image(image: dict[str, Any], path: Path) -> None:
    where, name = f"image {image['id']} of {path}", image.get("file_name")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where} has no file_name")
    if PurePath(name).is_absolute() or PurePath(os.path.normpath(name)).parts[:1] == ("..",):
        raise InputError(f"{where} has the file_name {name}, which leaves the image folder")
    if not (_are_numbers([image.get("width"), image.get("height")]) and min(image["width"], image["height"]) >= 1):
        raise InputError(f"{where} has no positive width and height")


def _check_annotation(annotation: dict[str, Any], image_ids: set[int], path: Path) -> None:
    where, box = f"annotation {annotation['id']} of {path}", annotation.get("bbox")
    image_id = annotation.get("image_id")
    if not isinstance(image_id, int) or image_id not in image_ids:
        raise InputError(f"{where} belongs to image {image_id}, which is not in `images`")
    if not isinstance(annotation.get("category_id"), int):
        raise InputError(f"{where} has no integer category_id")
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        raise InputError(f"{where} has no bbox of four finite numbers x, y, width, height")
    if not _are_numbers([annotation.get("area")]):
        raise InputError(f"{where} has no area, a finite number of pixels")


def _are_numbers(values: Iterable[Any]) -> bool:
    try:
        return all(map(math.isfinite, values))
    except (TypeError, OverflowError):
        return False


def _index(content: dict[str, Any]) -> COCO:
    """pycocotools' index over an annotation file that is already loaded, without its messages."""
    for annotation in content["annotations"]:
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list):  # pycocotools takes a first polygon of four numbers for a box and fails
            annotation["segmentation"] = [x for x in polygons if not isinstance(x, list) or len(x) >= 6]
    coco = COCO()
    coco.dataset = {"info": {}, **content}  # loadRes copies `info`, which hand-made files often lack
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
