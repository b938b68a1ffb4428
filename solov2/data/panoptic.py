"""COCO panoptic annotations as a dataset of samples.

sample  as in data/coco.py, with instances from the segments that are things | in training also
        semantic uint8 [H, W]: the stuff label of each pixel, the number of stuff classes for things, 255 for void
        masks: `MaskMap` instead of `EncodedMasks`

Things, sorted by category id, are the classes of the instances, labels 0..T-1; stuff, sorted by category id, has the
stuff labels 0..S-1.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solov2.compute import span
from solov2.data.annotations import ImageId, ImageRecord, check_separators
from solov2.data.image_dataset import Box, ImageDataset
from solov2.data.panoptic_annotations import classes_fault
from solov2.data.panoptic_file import Segment, open_annotations
from solov2.errors import InputError, count
from solov2.ops.images import MAX_PIXELS
from solov2.ops.mask_map import MaskMap
from solov2.ops.panoptic import IGNORED, replace_ids

LOG = logging.getLogger(__name__)


class CocoPanoptic(ImageDataset):
    """Images, instances and semantic maps of one panoptic annotation file.

    Every segment of a thing is an instance, except crowds and those whose stated area or box is empty. In the semantic
    map, crowds are things. Ids of a PNG that the JSON lacks are void, unless red and blue are exchanged, and a segment
    without pixels has an empty mask: check-data reports both.

    Args:
        annotations: path of the JSON file.
        images: the folder that `file_name` of an image is relative to.
        segments: the folder of the PNGs; None: see `solov2.data.panoptic_file.segments_folder`.
        training: True gives images with at least one segment, also those without things; False gives every image that
            has an annotation, without instances (N = 0) and semantic map: no PNG is read.
        keep_empty: in training, keep images without a segment.
        min_size: in training, leave out images whose shorter edge is below this many pixels.
        crowd: the setting `data.crowd`: "ignore" leaves out things with `iscrowd` 1, "instance" takes them as
            instances, also for evaluation.
        skip_broken_images: instead of an image that cannot be read, or whose PNG cannot, return the next readable
            sample and warn.
        max_pixels: maximum width x height of an image; larger ones are rejected.
        decode_masks: False gives a `MaskMap`: in a crowded image, full-size masks can take gigabytes.

    Attributes:
        class_names, category_ids: of the things, by label.
        stuff_names, stuff_category_ids: of the stuff, by stuff label.
        image_ids, aspect_ratios: id and width / height of each image, in dataset order.
        panoptic: the annotation file, for evaluation.

    Raises:
        InputError: at construction, if the file is missing, not panoptic, or broken in a way that would stop training
            or evaluation later; on access, if an image or a PNG is missing, damaged, or not of the stated size, or a
            PNG has red and blue exchanged.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        segments: str | Path | None = None,
        training: bool,
        keep_empty: bool = False,
        min_size: int = 32,
        crowd: str = "ignore",
        skip_broken_images: bool = False,
        max_pixels: int = MAX_PIXELS,
        decode_masks: bool = True,
    ) -> None:
        super().__init__(
            annotations,
            images,
            training=training,
            skip_broken_images=skip_broken_images,
            max_pixels=max_pixels,
            decode_masks=decode_masks,
        )
        self.panoptic = open_annotations(annotations, segments, crowd=crowd, max_pixels=max_pixels)
        fault = classes_fault(self.panoptic.categories)
        if fault is not None:
            raise InputError(f"{self.annotation_file} {fault}")
        things, stuff = (
            sorted(x for x in self.panoptic.categories if x.is_thing == is_thing) for is_thing in (True, False)
        )
        self.category_ids, self.class_names = [x.id for x in things], [x.name for x in things]
        self.stuff_category_ids, self.stuff_names = [x.id for x in stuff], [x.name for x in stuff]
        self._labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        # The label of each category in the semantic map: things have one in common.
        self._semantic_labels = {category_id: label for label, category_id in enumerate(self.stuff_category_ids)}
        self._semantic_labels |= dict.fromkeys(self.category_ids, len(stuff))
        records = self._select(min_size, keep_empty)
        self.image_ids = [record.image_id for record in records]
        self.aspect_ratios = [record.width / record.height for record in records]

    def _select(self, min_size: int, keep_empty: bool) -> list[ImageRecord]:
        """The images of the dataset. Logs what is left out."""
        bare, unusable, records, chosen = self.panoptic.bare_image_ids, list[tuple[ImageId, int]](), [], []
        for image_id in self.panoptic.image_ids:
            record, _, segments = self.panoptic[image_id]
            records.append(record)
            if not self.training or (min(record.height, record.width) >= min_size and (keep_empty or segments)):
                chosen.append(record)
            unusable += [(image_id, x.id) for x in segments if self._is_thing(x) and not _is_usable(x)]
        if bare:
            LOG.warning(
                f"{count(len(bare), 'image')} of {self.annotation_file} {'has' if len(bare) == 1 else 'have'} no "
                f"annotation and {'is' if len(bare) == 1 else 'are'} left out, such as image {bare[0]}"
            )
        if unusable and self.training:
            LOG.warning(
                f"{count(len(unusable), 'thing')} of {self.annotation_file} cannot be used as instances, because their "
                f"area or box is empty; the first is segment {unusable[0][1]} of image {unusable[0][0]} (solov2 "
                "check-data lists them all)"
            )
        check_separators(records, self.image_root, self.annotation_file)
        if not chosen:
            raise InputError(
                f"{self.annotation_file} has no usable image: training needs one with a shorter edge of at least "
                f"{min_size} pixels and a segment"
            )
        return chosen

    def record(self, position: int) -> ImageRecord:
        """What the annotation file says about the image at a position."""
        return self.panoptic[self.image_ids[position]].record

    def boxes(self, position: int) -> list[tuple[Box, int]]:
        """(box xyxy, label) of the instances of the image at a position."""
        segments = self._instances(self.panoptic[self.image_ids[position]].segments)
        return [(_corners(segment.box), self._labels[segment.category_id]) for segment in segments]

    def has_ground_truth(self) -> bool:
        """Whether any segment counts in evaluation: not crowds."""
        return any(not x.is_crowd for image_id in self.image_ids for x in self.panoptic[image_id].segments)

    def files(self) -> list[tuple[str, Path, list[str], str]]:
        """What the dataset reads, see `ImageDataset.files`: also the PNGs."""
        names = [self.panoptic[image_id].png for image_id in self.image_ids]
        return [*super().files(), ("PNG", self.panoptic.folder, names, "--val-segments")]

    def _is_thing(self, segment: Segment) -> bool:
        return segment.category_id in self._labels and not segment.is_crowd

    def _instances(self, segments: list[Segment]) -> list[Segment]:
        return [segment for segment in segments if self._is_thing(segment) and _is_usable(segment)]

    def _load(self, position: int) -> dict[str, Any]:
        record, _, segments = self.panoptic[self.image_ids[position]]
        size = (record.height, record.width)
        sample: dict[str, Any] = {"image": self._read_image(record)}  # first: the stated size may not be true
        instances, ids = list[Segment](), np.zeros(size, dtype=np.int32)
        with span("annotation masks"):
            if self.training:
                instances, ids = self._instances(segments), self.panoptic.read_map(record.image_id)
                labels = {segment.id: self._semantic_labels[segment.category_id] for segment in segments}
                sample["semantic"] = torch.from_numpy(replace_ids(ids, labels, other=IGNORED, dtype=np.uint8))
            masks = MaskMap(np.array([segment.id for segment in instances], dtype=np.int64), ids)
            sample["masks"] = _draw(masks) if self.decode_masks else masks
        boxes = [_corners(segment.box) for segment in instances]
        return {
            **sample,
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([self._labels[segment.category_id] for segment in instances], dtype=torch.int64),
            "image_id": record.image_id,
            "original_size": size,
        }


def _is_usable(segment: Segment) -> bool:
    """Whether the segment of a thing is a training instance (mmdetection's `CocoPanopticDataset`)."""
    return segment.area > 0 and segment.box[2] >= 1 and segment.box[3] >= 1


def _corners(box: Box) -> Box:
    x, y, width, height = box
    return x, y, x + width, y + height


def _draw(masks: MaskMap) -> Tensor:
    return torch.cat([planes for planes, _ in masks.chunks()])
