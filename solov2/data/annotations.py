"""The checks for COCO annotation files, each written once: loading stops at the first fault, check-data reports all.

A `Problem` is a fault that stops loading; `reason_unusable` says why an annotation is not a training instance.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from solov2.data.recognize import describe_bytes, describe_json
from solov2.errors import InputError, count
from solov2.ops.images import MAX_PIXELS
from solov2.ops.masks import check_segmentation

LOG = logging.getLogger(__name__)
SECTIONS = {"images": "image", "annotations": "annotation", "categories": "category"}
MAX_DEPTH = 100  # of nested values; COCO's have 5, and Python's own recursion ends at a few hundred
MAX_ID = 2**63 - 1
MAX_CROWD_SHARE = 0.1  # of the annotations; COCO has 0.012. More are probably single objects that a tool has flagged


ImageId = int | str  # a string only in panoptic files


class ImageRecord(NamedTuple):
    """The fields of an entry of `images` that loading uses."""

    image_id: ImageId
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
    segment: int | None = None  # of a panoptic annotation: the place in its `segments_info`

    def sentence(self, path: str | Path) -> str:
        """The message with the file and the entry in front."""
        return f"{self.where} of {path} {self.message}" if self.where else f"{path} {self.message}"


def load_json(path: Path) -> dict[str, Any]:
    """Parse an annotation file and check that it has its three lists, but not their entries.

    Raises:
        InputError: the file is missing, not JSON, or not in COCO's instance format; the message says what it is.
    """
    return require_instances(parse_json(path), path)


def parse_json(path: Path, kind: str = "annotation file") -> Any:
    """Parse an annotation file of any format, or another `kind` of file.

    Raises:
        InputError: the file is missing, not JSON, or nested too deeply for a format of COCO.
    """
    if path.is_dir():
        raise InputError(f"{kind} {path} is a folder; name the JSON file")
    if not path.is_file():
        raise InputError(f"{kind} {path} does not exist")
    too_deep = InputError(f"{kind} {path} is nested too deeply to be in COCO's format")
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except OSError as error:
        raise InputError(f"{kind} {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        reason = describe_bytes(data) or f"is not valid JSON; it may be truncated ({error})"
        raise InputError(f"{kind} {path} {reason}") from error
    except RecursionError as error:
        raise too_deep from error
    if _is_deeper(content, MAX_DEPTH):
        raise too_deep
    return content


def require_instances(content: Any, path: Path) -> dict[str, Any]:
    """The content of an annotation file if it may be in COCO's instance format.

    Raises:
        InputError: it is not; the message says what it is.
    """
    what = describe_json(content)
    if what is not None:
        raise InputError(f"annotation file {path} {what}")
    return require_lists(content, path, tuple(SECTIONS), "COCO's instance format")


def require_lists(content: Any, path: Path, keys: Sequence[str], name: str) -> dict[str, Any]:
    """The content of an annotation file in the format `name` if it has these lists.

    Raises:
        InputError: it lacks one.
    """
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"annotation file {path} has no list `{key}`, so it is not in {name}")
    return content


def _is_deeper(content: Any, limit: int) -> bool:
    """Whether JSON values are nested more than `limit` levels deep, found without recursion."""
    level: list[Any] = [[content]]
    for _ in range(limit + 1):
        inner = (value.values() if type(value) is dict else value for value in level)
        level = [value for values in inner for value in values if type(value) is dict or type(value) is list]
    return bool(level)


def read_annotations(
    path: Path, *, crowd: str = "ignore", max_pixels: int = MAX_PIXELS, named: bool = True
) -> dict[str, Any]:
    """Load a COCO annotation file and check its ids, references, file names and numbers, but not its segmentations.

    A missing `iscrowd` is set to 0, as pycocotools' evaluation needs it. The share of crowds is logged.

    Args:
        path: the file.
        crowd: the setting `data.crowd`; "instance" sets every `iscrowd` to 0.
        max_pixels: maximum width x height of an image.
        named: whether images must have a file name.

    Raises:
        InputError: the message names the file and the image, annotation or category.
    """
    content = load_json(path)
    annotations = content["annotations"]
    if lacks_masks(annotations):
        raise InputError(f"{path} {NO_MASKS}")
    for problem in find_problems(content, max_pixels=max_pixels, named=named):
        raise InputError(problem.sentence(path))
    for annotation in annotations:
        annotation["iscrowd"] = 0 if crowd == "instance" else annotation.get("iscrowd", 0)
    crowds = count_crowds(annotations)
    if crowds:
        LOG.log(
            logging.WARNING if crowds > MAX_CROWD_SHARE * len(annotations) else logging.INFO,
            "%s: %s",
            path,
            crowd_message(crowds, len(annotations)),
        )
    return content


NO_MASKS = (
    "has boxes or keypoints but no masks: not one annotation has a segmentation, and instance segmentation is learned "
    "from masks"
)


def lacks_masks(annotations: Sequence[Any]) -> bool:
    """Whether there are annotations, but none with a segmentation, as in a file for detection."""
    return bool(annotations) and not any(isinstance(a, dict) and a.get("segmentation") for a in annotations)


def count_crowds(annotations: Iterable[Mapping[str, Any]]) -> int:
    """Number of annotations with `iscrowd` 1."""
    return sum(annotation.get("iscrowd", 0) == 1 for annotation in annotations)


def crowd_message(crowds: int, total: int) -> str:
    """How many of the annotations are crowds and, if their share is unusual, what to do."""
    text = (
        f"{crowds:,} of {count(total, 'annotation')} ({crowds / total:.1%}) have iscrowd 1: training leaves them out "
        "and evaluation ignores them"
    )
    if crowds <= MAX_CROWD_SHARE * total:
        return text
    return (
        f"{text}; if they are single objects, which some tools flag when they are drawn with a brush, set "
        "data.crowd=instance or write a corrected file with solov2 check-data --set data.crowd=instance --fix FILE"
    )


def find_problems(content: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS, named: bool = True) -> Iterator[Problem]:
    """All faults that stop loading: first those of ids, then the first of each entry. Segmentations are not checked,
    nor file names unless images must be `named`.
    """
    for section in SECTIONS:
        yield from id_problems(content[section], section)
    image_ids = {image["id"] for image in content["images"] if has_id(image)}
    checks = {
        "images": lambda image: (name_fault(image) if named else None) or size_fault(image, max_pixels),
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
    """Whether a JSON value is an integer of 64 bits; booleans, which are integers in Python, do not count."""
    return isinstance(value, int) and not isinstance(value, bool) and -MAX_ID <= value <= MAX_ID


def all_finite(values: Iterable[Any]) -> bool:
    """Whether all values are finite numbers; strings and booleans do not count."""
    try:
        return all(not isinstance(value, bool) and math.isfinite(value) for value in values)
    except (TypeError, OverflowError):
        return False


def id_problems(entries: list[Any], section: str) -> Iterator[Problem]:
    """Entries of a section whose id is no integer, or that of an earlier entry."""
    kind, ids = SECTIONS[section], set()
    for index, entry in enumerate(entries):
        if not has_id(entry):
            text = f"has {'an' if kind[0] in 'ai' else 'a'} {kind} without an integer id: {str(entry)[:80]}"
            yield Problem("no id", section, index, "", text)
        elif entry["id"] in ids:
            yield Problem("id twice", section, index, "", f"uses {kind} id {entry['id']} twice")
        else:
            ids.add(entry["id"])


def image_fault(image: dict[str, Any], max_pixels: int = MAX_PIXELS) -> tuple[str, str] | None:
    """(kind, message) of the first fault in an entry of `images`, or None."""
    return name_fault(image) or size_fault(image, max_pixels)


def name_fault(image: dict[str, Any]) -> tuple[str, str] | None:
    """(kind, message) of a fault in the file name of an entry of `images`, or None."""
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        hint = ", but a coco_url, as in LVIS (solov2 check-data --fix takes the name from it)" * ("coco_url" in image)
        return "file name", f"has no file_name{hint}"
    if is_outside(name):
        return "file outside", f"has the file_name {name}, which is outside the image folder"
    return None


def size_fault(image: dict[str, Any], max_pixels: int = MAX_PIXELS) -> tuple[str, str] | None:
    """(kind, message) of a fault in the size of an entry of `images`, or None."""
    size: list[Any] = [image.get("width"), image.get("height")]
    if not (all_finite(size) and min(size) >= 1 and all(side == int(side) for side in size)):
        return "size", "has no positive width and height in whole pixels"
    if size[0] * size[1] > max_pixels:
        limit = f"more than the maximum of {max_pixels} set by data.max_image_pixels"
        return "size", f"has {size[0]} x {size[1]} pixels, {limit}"
    return None


def is_outside(name: str) -> bool:
    """Whether a file name leaves the folder that it is relative to."""
    return PurePath(name).is_absolute() or PurePath(os.path.normpath(name)).parts[:1] == ("..",)


def category_fault(category: dict[str, Any]) -> tuple[str, str] | None:
    """(kind, message) of the first fault in an entry of `categories`, or None."""
    return None if isinstance(category.get("name"), str) else ("category name", "has no name")


def annotation_fault(annotation: dict[str, Any], image_ids: Collection[ImageId]) -> tuple[str, str] | None:
    """(kind, message) of the first fault in an entry of `annotations`, not counting its segmentation, or None."""
    image_id = annotation.get("image_id")
    if not is_integer(image_id) or image_id not in image_ids:
        return "unknown image", f"belongs to image {image_id!r}, which is not in `images`"
    if not is_integer(annotation.get("category_id")):
        return "category id", "has no integer category_id"
    return number_fault(annotation)


def number_fault(annotation: dict[str, Any]) -> tuple[str, str] | None:
    """(kind, message) of the first fault in the `bbox`, `area` and `iscrowd` of an annotation or segment, or None."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all_finite(box):
        return "box", "has no bbox of four finite numbers x, y, width, height"
    if not all_finite([annotation.get("area")]):
        return "area", "has no area, or one that is not a finite number"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "iscrowd", f"has iscrowd {annotation['iscrowd']!r}, which is neither 0 nor 1"
    return None


def segmentation_fault(annotation: dict[str, Any], size: tuple[int, int]) -> str | None:
    """What is wrong with an annotation's segmentation in an image of `size` (h, w), or None."""
    if annotation.get("segmentation") in (None, [], {}, ""):
        return "the segmentation is missing or empty; it must be a list of polygons or an RLE: a box is not enough"
    try:
        check_segmentation(annotation.get("segmentation"), size)
    except InputError as error:
        return str(error)
    return None


def check_separators(records: Iterable[ImageRecord], root: Path, path: Path) -> None:
    """Refuse file names with Windows's separators that name no file here.

    Raises:
        InputError: a file_name has a backslash, and `root` has no file of that name.
    """
    for record in records:
        if "\\" in record.file_name and not is_file(root / record.file_name):
            raise InputError(
                f"image {record.image_id} of {path} has the file_name {record.file_name} with Windows's separator \\, "
                f"and {root} has no file of that name; write / (solov2 check-data --fix does)"
            )


def require_folder(path: Path) -> None:
    """Raises InputError if an image folder does not exist or is a file."""
    if not path.is_dir():
        raise InputError(f"image folder {path} {'is a file, not a folder' if path.exists() else 'does not exist'}")


def is_file(path: Path) -> bool:
    """Whether a file exists; False for a name that the file system rejects."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


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
