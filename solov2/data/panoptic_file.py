"""COCO panoptic annotations, or predictions in their format: a JSON file that has been checked and a folder of PNGs.

A pixel of a PNG is the id of its segment, R + 256 G + 65536 B; 0 is void.
"""

from __future__ import annotations

import logging
import marshal
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solov2.data.annotations import ImageId, ImageRecord
from solov2.data.panoptic_annotations import (
    Category,
    find_panoptic_problems,
    find_prediction_problems,
    has_image_id,
    load_panoptic_json,
)
from solov2.errors import InputError, count
from solov2.ops.image_files import MAX_PIXELS, open_image
from solov2.ops.images import is_deep
from solov2.ops.panoptic import ids_from_rgb, swap_red_and_blue

LOG = logging.getLogger(__name__)
SWAPPED = "red and blue are exchanged in the PNG: with them exchanged back, its ids are those of the JSON"
SAMPLE_STEP = 8  # pixels; the ids of every 64th pixel show whether colors are exchanged, in 1 % of the time of reading


class Segment(NamedTuple):
    """An entry of `segments_info`. Predictions have neither area, box nor crowds: theirs are 0 and False."""

    id: int
    category_id: int
    is_crowd: bool
    area: float  # in pixels, as the file states it
    box: tuple[float, float, float, float]  # x, y, width, height


class Annotation(NamedTuple):
    """What a file has about an image."""

    record: ImageRecord
    png: str  # relative to the folder
    segments: list[Segment]


class PanopticFile:
    """The annotations of a panoptic file whose JSON has been checked, in one block of memory.

    Attributes:
        path: the JSON file.
        folder: of the PNGs.
        categories: in the order of the file.
        image_ids: of the images with an annotation, in the order of `annotations`.
        bare_image_ids: of the images without an annotation.
        max_pixels: maximum width x height of a PNG.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        categories: Sequence[Category],
        annotations: Sequence[Annotation],
        *,
        bare_image_ids: Sequence[ImageId] = (),
        max_pixels: int,
    ) -> None:
        self.path, self.folder, self.categories, self.max_pixels = path, folder, list(categories), max_pixels
        self.image_ids = [annotation.record.image_id for annotation in annotations]
        self.bare_image_ids = list(bare_image_ids)
        self._places = {image_id: place for place, image_id in enumerate(self.image_ids)}
        # As in CocoInstances: one block instead of millions of objects, so that workers share its memory.
        packed = [marshal.dumps((tuple(record), png, [*map(tuple, found)])) for record, png, found in annotations]
        self._packed, self._offsets = b"".join(packed), np.cumsum([0, *map(len, packed)])

    def __contains__(self, image_id: ImageId) -> bool:
        """Whether the file has an annotation of this image."""
        return image_id in self._places

    def __getitem__(self, image_id: ImageId) -> Annotation:
        """The annotation of an image; its segments are in the order of the file."""
        place = self._places[image_id]
        record, png, segments = marshal.loads(self._packed[slice(*self._offsets[place : place + 2])])
        return Annotation(ImageRecord(*record), png, [Segment(*values) for values in segments])

    def read_map(self, image_id: ImageId) -> np.ndarray:
        """The segment ids of the PNG of an image: int32 [H, W], 0 for void.

        Raises:
            InputError: as in `read_segment_map`; or red and blue are exchanged.
        """
        record, png, segments = self[image_id]
        path, known = self.folder / png, {segment.id for segment in segments}
        try:
            ids = read_segment_map(path, (record.height, record.width), max_pixels=self.max_pixels)
            sample = np.unique(ids[::SAMPLE_STEP, ::SAMPLE_STEP]).tolist()
            if looks_swapped({*sample} - known - {0}, known):
                raise InputError(f"ids of {path} are not in the JSON: {SWAPPED}")
            return ids
        except InputError as error:
            raise InputError(f"{error} (segments of image {image_id} in {self.path})") from error


def open_annotations(
    path: str | Path, folder: str | Path | None = None, *, crowd: str = "ignore", max_pixels: int = MAX_PIXELS
) -> PanopticFile:
    """Load and check a panoptic annotation file; no PNG is read.

    Args:
        path: the JSON file.
        folder: of the PNGs; None looks for it, see `segments_folder`.
        crowd: the setting `data.crowd`; "instance" takes no segment as a crowd.
        max_pixels: maximum width x height of an image.

    Raises:
        InputError: the message names the file and the image, segment or category.
    """
    path = Path(path)
    content = load_panoptic_json(path)
    for problem in find_panoptic_problems(content, max_pixels=max_pixels):
        raise InputError(problem.sentence(path))
    categories = [Category(x["id"], x["name"], bool(x["isthing"])) for x in content["categories"]]
    stuff = {category.id for category in categories if not category.is_thing}
    records = {
        x["id"]: ImageRecord(x["id"], x["file_name"], int(x["height"]), int(x["width"])) for x in content["images"]
    }
    annotations = [
        Annotation(records[x["image_id"]], x["file_name"], _segments(x, crowd=crowd)) for x in content["annotations"]
    ]
    crowds = [(x, s) for x in annotations for s in x.segments if s.is_crowd and s.category_id in stuff]
    if crowds:
        LOG.warning(
            f"{count(len(crowds), 'segment')} of stuff in {path} {'has' if len(crowds) == 1 else 'have'} iscrowd 1, "
            f"which is meant for things; the first is segment {crowds[0][1].id} of image {crowds[0][0].record.image_id}"
        )
    bare = records.keys() - {x.record.image_id for x in annotations}
    return PanopticFile(
        path,
        segments_folder(path, folder),
        categories,
        annotations,
        bare_image_ids=[image_id for image_id in records if image_id in bare],
        max_pixels=max_pixels,
    )


def open_predictions(path: str | Path, truth: PanopticFile, folder: str | Path | None = None) -> PanopticFile:
    """Load and check a file of predictions for the images of `truth`; no PNG is read.

    Only `annotations` are needed, and of a segment only `id` and `category_id`. Other images are left out.

    Raises:
        InputError: the message names the file and the image or segment; an image of `truth` is missing.
    """
    path = Path(path)
    content = load_panoptic_json(path, predictions=True)
    category_ids = {category.id for category in truth.categories}
    wanted = [x for x in content["annotations"] if not (has_image_id(x, "image_id") and x["image_id"] not in truth)]
    for problem in find_prediction_problems(wanted, truth.image_ids, category_ids):
        raise InputError(problem.sentence(path))
    present = {x["image_id"] for x in wanted}
    missing = [image_id for image_id in truth.image_ids if image_id not in present]
    others = {str(x["image_id"]): x["image_id"] for x in content["annotations"]} if missing else {}
    if missing and str(missing[0]) in others:
        raise InputError(
            f"{path} has predictions for image {others[str(missing[0])]!r}, but {truth.path} has image {missing[0]!r}; "
            "ids of images must be integers in both, or text in both"
        )
    if missing:
        raise InputError(
            f"{path} has no predictions for {count(len(missing), 'image')} of {truth.path}, such as image "
            f"{missing[0]!r}; an image on which nothing was found needs an empty segments_info and a black PNG"
        )
    found = [Annotation(truth[x["image_id"]].record, x["file_name"], _segments(x, predicted=True)) for x in wanted]
    return PanopticFile(path, segments_folder(path, folder), truth.categories, found, max_pixels=truth.max_pixels)


def _segments(annotation: Mapping[str, Any], *, crowd: str = "ignore", predicted: bool = False) -> list[Segment]:
    infos = annotation["segments_info"]
    if predicted:
        return [Segment(x["id"], x["category_id"], False, 0, (0, 0, 0, 0)) for x in infos]
    crowds = [x.get("iscrowd", 0) == 1 and crowd != "instance" for x in infos]
    return [Segment(x["id"], x["category_id"], flag, x["area"], tuple(x["bbox"])) for x, flag in zip(infos, crowds)]


def segments_folder(annotations: Path, folder: str | Path | None = None) -> Path:
    """The folder of the PNGs: the one that is named, or else the annotation file's path without .json.

    detectron2 expects the latter one level higher, so that is tried, too.

    Raises:
        InputError: the folder does not exist.
    """
    stem = annotations.with_suffix("")
    places = [stem, stem.absolute().parent.parent / stem.name] if folder is None else [Path(folder)]
    for place in places:
        if place.is_dir():
            return place
    tried = " nor ".join(map(str, places))
    raise InputError(
        f"the PNGs of the panoptic annotations {annotations} are missing: "
        f"{f'neither {tried} is a folder' if len(places) > 1 else f'{tried} is not a folder'}"
    )


def read_segment_map(path: Path, size: tuple[int, int], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The segment ids of a PNG of `size` (h, w): int32 [H, W], 0 for void.

    Raises:
        InputError: the file is missing, damaged, no PNG, of another size, larger than `max_pixels`, or has not three
            channels of 8 bits; or the path is a folder.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; segment ids must be in a PNG")
    with open_image(path, max_pixels=max_pixels) as image:
        if image.format != "PNG":
            lossy = ", whose compression changes the ids" if image.format == "JPEG" else ""
            raise InputError(f"{path} is a {image.format} file{lossy}; segment ids must be in a PNG")
        if image.mode != "RGB" or is_deep(image):
            bits = "16 bits per channel" if is_deep(image) else f"the pixel format {image.mode}"
            raise InputError(f"{path} has {bits}, but segment ids must be in an RGB PNG with 8 bits per channel")
        if (image.height, image.width) != tuple(size):
            raise InputError(f"{path} is {image.width} x {image.height}, but its image is {size[1]} x {size[0]}")
        return ids_from_rgb(np.asarray(image))


def looks_swapped(unknown: Collection[int], known: Collection[int]) -> bool:
    """Whether ids of a PNG that the JSON lacks are those of the JSON (`known`) with red and blue exchanged."""
    swapped = swap_red_and_blue(np.array([*unknown], dtype=np.int64))
    return len(unknown) > 1 and 2 * int(np.isin(swapped, [*known]).sum()) > len(unknown)
