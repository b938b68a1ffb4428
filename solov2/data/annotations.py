"""The checks for COCO annotation files, each written once: loading stops at the first fault, check-data reports all.

A `Problem` is a fault that stops loading; `reason_unusable` says why an annotation is not a training instance.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from solov2.errors import InputError
from solov2.ops.images import MAX_PIXELS
from solov2.ops.masks import check_segmentation

SECTIONS = {"images": "image", "annotations": "annotation", "categories": "category"}


class ImageRecord(NamedTuple):
    """The fields of an entry of `images` that loading uses."""

    image_id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class Problem:
    """A fault that stops loading: its kind, the entry it is in, and the message."""

    kind: str
    section: str
    index: int  # of the entry within its section
    where: str  # such as "annotation 7"; empty if the id itself is wrong
    message: str

    def sentence(self, path: str | Path) -> str:
        """The message with the file and the entry in front."""
        return f"{self.where} of {path} {self.message}" if self.where else f"{path} {self.message}"


def load_json(path: Path) -> dict[str, Any]:
    """Parse an annotation file and check that it has its three lists, but not their entries.

    Raises:
        InputError: the file is missing, not JSON, or not in COCO's instance format.
    """
    if not path.is_file():
        raise InputError(f"annotation file {path} does not exist")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"annotation file {path} is not valid JSON; it may be truncated ({error})") from error
    except RecursionError as error:
        raise InputError(f"annotation file {path} is nested too deeply to be COCO's instance format") from error
    for key in SECTIONS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"annotation file {path} has no list `{key}`, so it is not in COCO's instance format")
    return content


def read_annotations(path: Path) -> dict[str, Any]:
    """Load a COCO annotation file and check its ids, references, file names and numbers, but not its segmentations.

    A missing `iscrowd` is set to 0, as pycocotools' evaluation needs it.

    Raises:
        InputError: the message names the file and the image, annotation or category.
    """
    content = load_json(path)
    for problem in find_problems(content):
        raise InputError(problem.sentence(path))
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
    return content


def find_problems(content: Mapping[str, Any]) -> Iterator[Problem]:
    """All faults that stop loading: first those of ids, then the first of each entry. Segmentations are not checked."""
    for section in SECTIONS:
        yield from _id_problems(content[section], section)
    image_ids = {image["id"] for image in content["images"] if has_id(image)}
    checks = {
        "images": image_fault,
        "categories": category_fault,
        "annotations": lambda annotation: annotation_fault(annotation, image_ids),
    }
    for section, check in checks.items():
        for index, entry in enumerate(content[section]):
            fault = check(entry) if has_id(entry) else None
            if fault is not None:
                yield Problem(fault[0], section, index, f"{SECTIONS[section]} {entry['id']}", fault[1])


def has_id(entry: Any) -> bool:
    """Whether an entry is an object with an integer id."""
    return isinstance(entry, dict) and is_integer(entry.get("id"))


def is_integer(value: Any) -> bool:
    """Whether a JSON value is an integer; booleans, which are integers in Python, do not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def all_finite(values: Iterable[Any]) -> bool:
    """Whether all values are finite numbers; strings and booleans do not count."""
    try:
        return all(not isinstance(value, bool) and math.isfinite(value) for value in values)
    except (TypeError, OverflowError):
        return False


def _id_problems(entries: list[Any], section: str) -> Iterator[Problem]:
    kind, ids = SECTIONS[section], set()
    for index, entry in enumerate(entries):
        if not has_id(entry):
            text = f"has {'an' if kind[0] in 'ai' else 'a'} {kind} without an integer id: {str(entry)[:80]}"
            yield Problem("no id", section, index, "", text)
        elif entry["id"] in ids:
            yield Problem("id twice", section, index, "", f"uses {kind} id {entry['id']} twice")
        else:
            ids.add(entry["id"])


def image_fault(image: dict[str, Any]) -> tuple[str, str] | None:
    """(kind, message) of the first fault in an entry of `images`, or None."""
    name = image.get("file_name")
    size: list[Any] = [image.get("width"), image.get("height")]
    if not isinstance(name, str) or not name:
        return "file name", "has no file_name"
    if PurePath(name).is_absolute() or PurePath(os.path.normpath(name)).parts[:1] == ("..",):
        return "file outside", f"has the file_name {name}, which is outside the image folder"
    if not (all_finite(size) and min(size) >= 1 and all(side == int(side) for side in size)):
        return "size", "has no positive width and height in whole pixels"
    if size[0] * size[1] > MAX_PIXELS:
        return "size", f"has {size[0]} x {size[1]} pixels, more than the maximum of {MAX_PIXELS}"
    return None


def category_fault(category: dict[str, Any]) -> tuple[str, str] | None:
    """(kind, message) of the first fault in an entry of `categories`, or None."""
    return None if isinstance(category.get("name"), str) else ("category name", "has no name")


def annotation_fault(annotation: dict[str, Any], image_ids: set[int]) -> tuple[str, str] | None:
    """(kind, message) of the first fault in an entry of `annotations`, not counting its segmentation, or None."""
    image_id, box = annotation.get("image_id"), annotation.get("bbox")
    if not is_integer(image_id) or image_id not in image_ids:
        return "unknown image", f"belongs to image {image_id}, which is not in `images`"
    if not is_integer(annotation.get("category_id")):
        return "category id", "has no integer category_id"
    if not isinstance(box, list) or len(box) != 4 or not all_finite(box):
        return "box", "has no bbox of four finite numbers x, y, width, height"
    if not all_finite([annotation.get("area")]):
        return "area", "has no area, or one that is not a finite number"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "iscrowd", f"has iscrowd {annotation['iscrowd']!r}, which is neither 0 nor 1"
    return None


def segmentation_fault(annotation: dict[str, Any], size: tuple[int, int]) -> str | None:
    """What is wrong with an annotation's segmentation in an image of `size` (h, w), or None."""
    try:
        check_segmentation(annotation.get("segmentation"), size)
    except InputError as error:
        return str(error)
    return None


def reason_unusable(annotation: dict[str, Any], record: ImageRecord) -> str | None:
    """Why an annotation is not a training instance, or None if it is one (mmdetection's `parse_data_info`)."""
    x, y, width, height = annotation["bbox"]
    if annotation.get("iscrowd"):
        return "a crowd"
    if annotation["area"] <= 0:
        return "an area of 0 or less"
    if width < 1 or height < 1:
        return "a box less than 1 pixel wide or high"
    overlap_x = min(x + width, record.width) - max(x, 0)
    overlap_y = min(y + height, record.height) - max(y, 0)
    return None if overlap_x > 0 and overlap_y > 0 else "a box outside the image"


def count_short_polygons(segmentation: Any) -> int:
    """Number of polygons of a segmentation with fewer than three points, which are not drawn."""
    return sum(len(polygon) < 6 for polygon in segmentation) if isinstance(segmentation, list) else 0


def category_id_shift(used: Iterable[int], declared: Iterable[int]) -> int:
    """What to add to every used category id if all of them are off by one, else 0.

    It is 1 if 0..N-1 are used and 1..N declared, and -1 the other way round. It is 0 also when in doubt: the declared
    ids have gaps, the last declared id is used too, or there are other unknown ids.
    """
    used, declared = set(used), sorted(set(declared))
    if not used or not declared or declared[-1] - declared[0] != len(declared) - 1:
        return 0
    if declared[0] - 1 == min(used) and max(used) < declared[-1]:
        return 1
    if declared[-1] + 1 == max(used) and min(used) > declared[0]:
        return -1
    return 0
