"""COCO instance annotations as a dataset of samples.

sample  image uint8 [3, H, W] RGB | boxes float32 [N, 4] xyxy | labels int64 [N] | image_id int | original_size (h, w)
        masks uint8 [N, H, W], or EncodedMasks, which are only drawn at the size of the targets
        ignored, where asked for: the masks of the M crowds, as masks

Which annotations become instances follows mmdetection (`CocoDataset.parse_data_info`). An image must have the width and
height given in the JSON; EXIF rotation is not applied, because annotations refer to the stored pixels.
"""

from __future__ import annotations

import contextlib
import io
import logging
import marshal
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from solov2.compute import span
from solov2.data.annotations import (
    ImageId,
    ImageRecord,
    check_separators,
    count_short_polygons,
    read_annotations,
    reason_unusable,
    segmentation_fault,
)
from solov2.data.class_matching import shorten
from solov2.data.image_dataset import Box, ImageDataset
from solov2.errors import InputError, count
from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.images import MAX_PIXELS
from solov2.ops.masks import segmentations_to_masks
from solov2.suggestions import did_you_mean

LOG = logging.getLogger(__name__)


class CocoInstances(ImageDataset):
    """Images and instances of one COCO annotation file.

    Args:
        annotations: path of the JSON file.
        images: the folder that `file_name` is relative to.
        training: True gives images with their usable instances; False gives every image without instances (N = 0).
        keep_empty: in training, keep images without a usable instance.
        min_size: in training, leave out images whose shorter edge is below this many pixels.
        crowd: the setting `data.crowd`: "ignore" leaves out annotations with `iscrowd` 1, "instance" takes them as
            instances, also in the index for evaluation.
        skip_broken_images: instead of an image that cannot be read, return the next readable sample and warn.
        max_pixels: maximum width x height of an image; larger ones are rejected.
        decode_masks: False gives `EncodedMasks`: in a crowded image, full-size masks can take gigabytes.
        classes: names of the categories to keep; annotations of others are left out. None or empty: all.
        source: a user's dataset that has the images, see `ImageDataset`.
        ignored: in training, samples also have the masks of the crowds, which an auxiliary semantic loss leaves out.

    Attributes:
        class_names: in order of category id; a label is an index into this list.
        category_ids: the file's category id of each label.
        image_ids, aspect_ratios: id and width / height of each image, in dataset order.
        unknown_categories: category ids that are not in `categories` -> number of annotations with that id.

    Raises:
        InputError: at construction, if the file is missing, not COCO, or broken in a way that would stop training or
            evaluation later; on access, if an image is missing, damaged, or not of the stated size.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        training: bool,
        keep_empty: bool = False,
        min_size: int = 32,
        crowd: str = "ignore",
        skip_broken_images: bool = False,
        max_pixels: int = MAX_PIXELS,
        decode_masks: bool = True,
        classes: Sequence[str] | None = None,
        ignored: bool = False,
        source: Dataset | None = None,
    ) -> None:
        super().__init__(
            annotations,
            images,
            training=training,
            skip_broken_images=skip_broken_images,
            max_pixels=max_pixels,
            decode_masks=decode_masks,
            source=source,
        )
        self._crowd, self._ignored = crowd, ignored and training
        self._classes = tuple(classes or ())
        content = self._read()
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.class_names = [category["name"] for category in categories]
        records = [ImageRecord(x["id"], x["file_name"], int(x["height"]), int(x["width"])) for x in content["images"]]
        check_separators(records, self.image_root, self.annotation_file)
        instances, crowds = self._collect(content["annotations"], {record.image_id: record for record in records})
        if training:
            records = [
                record
                for record in records
                if min(record.height, record.width) >= min_size and (keep_empty or instances[record.image_id])
            ]
        if not records:
            raise InputError(
                f"{self.annotation_file} has no usable image: training needs one with a shorter edge of at least "
                f"{min_size} pixels and an instance that is not a crowd, has a category in `categories` and a positive "
                "area, and lies inside the image"
            )
        self.image_ids = [record.image_id for record in records]
        self.aspect_ratios = [record.width / record.height for record in records]
        # One block of bytes instead of millions of objects, so that workers share its memory: updating the objects'
        # reference counts would copy all annotations into each worker. (marshal: plain values, only read back here.)
        packed = [marshal.dumps((tuple(x), instances[x.image_id], crowds[x.image_id])) for x in records]
        self._packed, self._offsets = b"".join(packed), np.cumsum([0, *map(len, packed)])
        self._coco = None if training else _build_index(content)

    def _read(self) -> dict[str, Any]:
        """The content of the annotation file, checked, with the chosen classes only."""
        content = read_annotations(self.annotation_file, crowd=self._crowd, max_pixels=self.max_pixels)
        if not self._classes:
            return content
        require_classes(self._classes, content["categories"], self.annotation_file)
        categories = [category for category in content["categories"] if category["name"] in self._classes]
        # Unknown ids stay, to be reported.
        left_out = {category["id"] for category in content["categories"]} - {category["id"] for category in categories}
        annotations = [x for x in content["annotations"] if x["category_id"] not in left_out]
        return {**content, "categories": categories, "annotations": annotations}

    @property
    def coco(self) -> COCO:
        """pycocotools' index of the annotation file, for evaluation; in training, first use reads the file again."""
        if self._coco is None:
            self._coco = _checked_index(self._read(), self.annotation_file)  # training checked its instances only
        return self._coco

    def record(self, position: int) -> ImageRecord:
        """What the annotation file says about the image at a position."""
        return self._unpack(position)[0]

    def boxes(self, position: int) -> list[tuple[Box, int]]:
        """(box xyxy, label) of the instances of the image at a position; in training only."""
        return [(box, label) for box, label, _ in self._unpack(position)[1]]

    def has_ground_truth(self) -> bool:
        """Whether any annotation counts in evaluation: not crowds, nor those of unknown categories."""
        known = set(self.category_ids)
        return any(not a["iscrowd"] and a["category_id"] in known for a in self.coco.dataset["annotations"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coco": None}  # workers never need it

    def _unpack(self, position: int) -> tuple[ImageRecord, list[tuple], list]:
        """The record of an image, its instances (box xyxy, label, segmentation), and segmentations of its crowds."""
        values, instances, crowds = marshal.loads(self._packed[slice(*self._offsets[position : position + 2])])
        return ImageRecord(*values), instances, crowds

    def _load(self, position: int) -> dict[str, Any]:
        record, instances, crowds = self._unpack(position)
        size = (record.height, record.width)
        image = self._read_image(record)  # first: the size that the file states may not be true
        with span("annotation masks"):
            masks = self._read_masks([segmentation for _, _, segmentation in instances], size)
            ignored = {"ignored": self._read_masks(crowds, size)} if self._ignored else {}
        return {
            "image": image,
            "boxes": torch.tensor([box for box, _, _ in instances], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for _, label, _ in instances], dtype=torch.int64),
            "masks": masks,
            "image_id": record.image_id,
            "original_size": size,
            **ignored,
        }

    def _read_masks(self, segmentations: list, size: tuple[int, int]) -> Tensor | EncodedMasks:
        if not self.decode_masks:
            return EncodedMasks.from_segmentations(segmentations, size)
        return segmentations_to_masks(segmentations, size)[0]

    def _collect(
        self, annotations: list[dict], records: dict[ImageId, ImageRecord]
    ) -> tuple[dict[ImageId, list[tuple]], dict[ImageId, list]]:
        """Image id -> (box xyxy, label, segmentation) of its usable annotations, with their segmentations checked, and
        image id -> segmentations of its crowds, where samples have them.

        Evaluation passes every annotation to pycocotools, crowds included, so it checks all of them.
        """
        labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        instances: dict[ImageId, list[tuple]] = {image_id: [] for image_id in records}
        crowds: dict[ImageId, list] = {image_id: [] for image_id in records}
        ignored: dict[str, list[str]] = defaultdict(list)  # reason to warn -> the annotations it applies to
        for annotation in annotations:
            record, category_id = records[annotation["image_id"]], annotation["category_id"]
            if category_id not in labels:
                self.unknown_categories[category_id] += 1
                left_out = f"{annotation['id']} with category {category_id}"
                ignored["have a category_id that is not in `categories` and are left out"].append(left_out)
                continue
            reason = reason_unusable(annotation, record)
            is_ignored = self._ignored and annotation["iscrowd"]
            if reason is None or not self.training or is_ignored:
                _require_segmentation(annotation, (record.height, record.width), self.annotation_file)
                if count_short_polygons(annotation["segmentation"]):
                    ignored["have polygons with fewer than three points, which are ignored"].append(annotation["id"])
            if reason is None and self.training:
                x, y, width, height = annotation["bbox"]
                box = (x, y, x + width, y + height)
                instances[record.image_id].append((box, labels[category_id], annotation["segmentation"]))
            elif is_ignored:
                crowds[record.image_id].append(annotation["segmentation"])
            elif self.training and not annotation["iscrowd"]:
                ignored["cannot be used as instances and are left out"].append(f"{annotation['id']} with {reason}")
        for what, found in ignored.items():
            LOG.warning(
                f"{len(found)} of {count(len(annotations), 'annotation')} of {self.annotation_file} {what}; the first "
                f"is annotation {found[0]} (solov2 check-data lists them all)"
            )
        return instances, crowds


def read_index(path: str | Path, *, crowd: str = "ignore", max_pixels: int = MAX_PIXELS) -> COCO:
    """pycocotools' index of an annotation file, for evaluation without images, which need no file names either.

    Args:
        path: the file.
        crowd, max_pixels: as for `CocoInstances`.

    Raises:
        InputError: the file is missing, not COCO, or broken.
    """
    return _checked_index(read_annotations(Path(path), crowd=crowd, max_pixels=max_pixels, named=False), Path(path))


def require_classes(classes: Iterable[str], categories: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Raises InputError if the categories of the annotation file `path` lack one of these names."""
    known = [category["name"] for category in categories]
    for name in classes:
        if name not in known:
            raise InputError(
                f"{path} has no class '{name}'{did_you_mean(name, known)}; its classes are {shorten(known)}"
            )


def _checked_index(content: dict[str, Any], path: Path) -> COCO:
    """pycocotools' index of an annotation file, after a check of the segmentations of its categories."""
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in content["images"]}
    known = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        if annotation["category_id"] in known:
            _require_segmentation(annotation, sizes[annotation["image_id"]], path)
    return _build_index(content)


def _require_segmentation(annotation: dict[str, Any], size: tuple[int, int], path: Path) -> None:
    fault = segmentation_fault(annotation, size)
    if fault is not None:
        raise InputError(f"annotation {annotation['id']} of {path}: {fault}")


def _build_index(content: dict[str, Any]) -> COCO:
    """pycocotools' index of an annotation file that is already loaded; its output is suppressed."""
    for annotation in content["annotations"]:
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list):  # pycocotools mistakes a first polygon of four numbers for a box and fails
            annotation["segmentation"] = [x for x in polygons if not isinstance(x, list) or len(x) >= 6]
    coco = COCO()
    coco.dataset = {"info": {}, **content}  # loadRes copies `info`, which hand-made files often lack
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
