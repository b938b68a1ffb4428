"""The checks for the JSON of COCO panoptic annotations, each written once: loading stops at the first fault, check-data
reports all.

`panoptic_file` reads the PNGs. A file of predictions has the same format, but needs less.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from solov2.data.annotations import (
    SECTIONS,
    ImageId,
    Problem,
    category_fault,
    has_id,
    id_problems,
    image_fault,
    is_integer,
    is_outside,
    number_fault,
    parse_json,
    require_lists,
)
from solov2.data.recognize import describe_json, is_panoptic
from solov2.errors import InputError
from solov2.ops.image_files import MAX_PIXELS
from solov2.ops.panoptic import MAX_SEGMENT_ID

FORMAT = "COCO's panoptic format"
MAX_STUFF = 254  # the semantic map is uint8: stuff, one label for all things, and 255 for void


class Category(NamedTuple):
    """An entry of `categories`."""

    id: int
    name: str
    is_thing: bool


def load_panoptic_json(path: Path, *, predictions: bool = False) -> dict[str, Any]:
    """Parse a panoptic annotation file and check that it has its three lists, but not their entries.

    Args:
        path: the file.
        predictions: the file holds predictions, which need `annotations` alone.

    Raises:
        InputError: the file is missing, not JSON, or not in COCO's panoptic format; the message says what it is.
    """
    content = parse_json(path)
    return require_panoptic(content, path, predictions=predictions)


def require_panoptic(content: Any, path: Path, *, predictions: bool = False) -> dict[str, Any]:
    """The content of an annotation file if it may be in COCO's panoptic format.

    Raises:
        InputError: it is not; the message says what it is.
    """
    what = None if is_panoptic(content) else describe_json(content)
    if what is not None:
        raise InputError(f"annotation file {path} {what}")
    content = require_lists(content, path, ("annotations",) if predictions else tuple(SECTIONS), FORMAT)
    if content["annotations"] and not is_panoptic(content):
        raise InputError(
            f"annotation file {path} has no segments_info, as an instances file; panoptic models need panoptic_*.json, "
            "and instance models take instances_*.json"
        )
    return content


def find_panoptic_problems(content: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS) -> Iterator[Problem]:
    """All faults that stop loading, the first of each image, category, annotation and segment."""
    yield from _image_problems(content["images"], max_pixels)
    yield from id_problems(content["categories"], "categories")
    for index, category in enumerate(content["categories"]):
        fault = (category_fault(category) or _kind_fault(category)) if has_id(category) else None
        if fault is not None:
            yield Problem(fault[0], "categories", index, f"category {category['id']}", fault[1])
    image_ids = {image["id"] for image in content["images"] if has_image_id(image)}
    category_ids = {category["id"] for category in content["categories"] if has_id(category)}
    yield from _annotation_problems(content["annotations"], image_ids, category_ids)


def find_prediction_problems(
    annotations: Sequence[Any], image_ids: Collection[ImageId], category_ids: Collection[int]
) -> Iterator[Problem]:
    """All faults of the `annotations` of a file of predictions, given the ids of the ground truth."""
    return _annotation_problems(annotations, image_ids, category_ids, predicted=True)


def has_image_id(entry: Any, key: str = "id") -> bool:
    """Whether an entry is an object with the id of an image: an integer or text."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return is_integer(value) or (isinstance(value, str) and value != "")


def classes_fault(categories: Sequence[Category]) -> str | None:
    """Why a panoptic model cannot be trained on these categories, as the end of a sentence, or None."""
    stuff = sum(not category.is_thing for category in categories)
    if stuff == len(categories):
        return (
            "has no things (isthing 1), without which there is no grid to train; use a model for semantic segmentation"
        )
    if not stuff:
        return "has no stuff (isthing 0), so its things are for an instance model: convert it to an instances file"
    return f"has {stuff} stuff categories, more than the maximum of {MAX_STUFF}" if stuff > MAX_STUFF else None


def _image_problems(images: Sequence[Any], max_pixels: int) -> Iterator[Problem]:
    seen: set[ImageId] = set()
    for index, image in enumerate(images):
        if not has_image_id(image):
            text = f"has an image whose id is neither an integer nor text: {str(image)[:80]}"
            yield Problem("no id", "images", index, "", text)
        elif image["id"] in seen:
            yield Problem("id twice", "images", index, "", f"uses image id {image['id']!r} twice")
        else:
            if seen and type(image["id"]) is not type(next(iter(seen))):
                text = (
                    f"has the image ids {next(iter(seen))!r} and {image['id']!r}; they must be all integers or all text"
                )
                yield Problem("mixed ids", "images", index, "", text)
            seen.add(image["id"])
            fault = image_fault(image, max_pixels)
            if fault is not None:
                yield Problem(fault[0], "images", index, f"image {image['id']}", fault[1])


def _kind_fault(category: Mapping[str, Any]) -> tuple[str, str] | None:
    if category.get("isthing") in (0, 1):
        return None
    return "isthing", f"has isthing {category['isthing']!r}, not 0 or 1" if "isthing" in category else "has no isthing"


def _annotation_problems(
    annotations: Sequence[Any],
    image_ids: Collection[ImageId],
    category_ids: Collection[int],
    *,
    predicted: bool = False,
) -> Iterator[Problem]:
    """Faults of `annotations`; where one of an annotation is found, its segments are not checked."""
    known, seen = set(image_ids), set[ImageId]()
    for index, entry in enumerate(annotations):
        fault = _annotation_fault(entry, known, seen)
        if fault is not None:
            where = f"the annotation of image {entry['image_id']}" if has_image_id(entry, "image_id") else ""
            yield Problem(fault[0], "annotations", index, where, fault[1])
            continue
        seen.add(entry["image_id"])
        ids: set[int] = set()
        for place, segment in enumerate(entry["segments_info"]):
            fault = _segment_fault(segment, ids, category_ids, predicted=predicted)
            if fault is None:
                ids.add(segment["id"])
                continue
            which = "the annotation" if fault[0].startswith("segment id") else f"segment {segment['id']}"
            where = f"{which} of image {entry['image_id']}"
            yield Problem(fault[0], "annotations", index, where, fault[1], segment=place)


def _annotation_fault(entry: Any, known: Collection[ImageId], seen: Collection[ImageId]) -> tuple[str, str] | None:
    if not has_image_id(entry, "image_id"):
        return "unknown image", f"has an annotation without the id of an image: {str(entry)[:80]}"
    name, segments = entry.get("file_name"), entry.get("segments_info")
    if entry["image_id"] not in known:
        return "unknown image", f"belongs to image {entry['image_id']!r}, which is not in `images`"
    if entry["image_id"] in seen:
        return "image twice", "is the second one of that image"
    if not isinstance(name, str) or not name:
        return "file name", "has no file_name, which names its PNG"
    if is_outside(name):
        return "file outside", f"has the file_name {name}, which is outside the folder of the PNGs"
    return None if isinstance(segments, list) else ("no segments", "has no list segments_info")


def _segment_fault(
    segment: Any, ids: Collection[int], category_ids: Collection[int], *, predicted: bool
) -> tuple[str, str] | None:
    if not has_id(segment) or not 0 < segment["id"] <= MAX_SEGMENT_ID:
        return "segment id", f"has a segment whose id is not 1 to {MAX_SEGMENT_ID} (0 is void): {str(segment)[:80]}"
    if segment["id"] in ids:
        return "segment id twice", f"has two segments with the id {segment['id']}"
    category = segment.get("category_id")
    if not is_integer(category):
        return "category id", "has no integer category_id"
    if category not in category_ids:
        where = "the ground truth" if predicted else "`categories`"
        return "unknown category", f"has category_id {category}, which is not in {where}"
    return None if predicted else number_fault(segment)
