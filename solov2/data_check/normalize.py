"""Read what the entries of an annotation file mean, whatever their notation.

Ids as text or fractions, paths of another machine, Windows separators, sizes that the file itself has, nested points:
only what the data determines is changed, and every change is listed.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from solov2.data.annotations import SECTIONS, has_id, image_fault, is_file, is_integer, segmentation_fault
from solov2.errors import InputError
from solov2.ops.images import MAX_PIXELS, read_header

Change = dict[str, Any]  # section, index, id, action, reason; here also kind (a key of findings.SEVERITIES)
Report = Callable[[str, str], None]  # of one entry: kind, reason
REFERENCES = (("image_id", "images", "unknown image"), ("category_id", "categories", "category id"))
_NUMBER = re.compile(r"\s*[+-]?\d{1,300}(\.\d*)?([eE][+-]?\d{1,3})?\s*", re.ASCII)
_FLAGS = {"": 0, "0": 0, "false": 0, "no": 0, "none": 0, "1": 1, "true": 1, "yes": 1}


def normalize(
    content: Mapping[str, Any], images: Path, *, crowd: str = "ignore", max_pixels: int = MAX_PIXELS
) -> tuple[dict[str, Any], list[Change]]:
    """A copy of a parsed annotation file in COCO's own notation, and the list of changes.

    Entries keep their places. What is not understood stays as it is, to be found by the checks of
    `solov2.data.annotations`.

    Args:
        content: has the three lists; their entries may be malformed.
        images: the folder that `file_name` is relative to.
        crowd: the setting `data.crowd`; "instance" sets every `iscrowd` to 0.
        max_pixels: maximum width x height of an image.
    """
    copied = {name: [dict(x) if isinstance(x, dict) else x for x in content[name]] for name in SECTIONS}
    changes: list[Change] = []

    def report(section: str, index: int, kind: str, reason: str) -> None:
        entry = copied[section][index]
        place = {"section": section, "index": index, "id": entry["id"] if has_id(entry) else None}
        changes.append({**place, "kind": kind, "action": "changed", "reason": reason})

    numbers = {section: _number_ids(copied[section], partial(report, section)) for section in SECTIONS}
    files = ImageFiles(images)
    for index, image in _objects(copied["images"]):
        _normalize_image(image, files, max_pixels, partial(report, "images", index))
    for index, category in _objects(copied["categories"]):
        _normalize_name(category, partial(report, "categories", index))
    known = {section: {entry["id"] for _, entry in _objects(copied[section]) if has_id(entry)} for section in SECTIONS}
    sizes = {
        image["id"]: (int(image["height"]), int(image["width"]))
        for _, image in _objects(copied["images"])
        if has_id(image) and image_fault(image, max_pixels) is None
    }
    for index, annotation in _objects(copied["annotations"]):
        report_change = partial(report, "annotations", index)
        for key, section, kind in REFERENCES:
            old, new = annotation.get(key), _reference(annotation.get(key), known[section], numbers[section])
            if new is not old:
                annotation[key] = new
                report_change(kind, f"{key} {new}, was {old!r}")
        _normalize_numbers(annotation, crowd, report_change)
        if is_integer(annotation.get("image_id")) and annotation["image_id"] in sizes:
            _normalize_segmentation(annotation, sizes[annotation["image_id"]], report_change)
    return {**content, **copied}, changes


def _objects(entries: list[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    return ((index, entry) for index, entry in enumerate(entries) if isinstance(entry, dict))


# ids


def _number_ids(entries: list[Any], report: Callable[[int, str, str], None]) -> dict[str | float, int]:
    """Give entries whose id is text or a fraction an integer id; returns {old id: new id}."""
    odd = [(index, entry) for index, entry in _objects(entries) if not has_id(entry) and _is_name(entry.get("id"))]
    taken = {entry["id"] for _, entry in _objects(entries) if has_id(entry)}
    numbers: dict[str | float, int] = {}
    for _, entry in odd:
        number = as_integer(entry["id"])
        free = number not in taken or isinstance(entry["id"], float)  # 1.0 is 1, even where that is an id already
        if number is not None and free and entry["id"] not in numbers:
            numbers[entry["id"]] = number
            taken.add(number)
    unused = itertools.count(max([0, *taken]) + 1)
    for index, entry in odd:
        old = entry["id"]
        entry["id"] = numbers[old] if old in numbers else numbers.setdefault(old, next(unused))
        report(index, "no id", f"id {entry['id']}, was {old!r}")
    return numbers


def _is_name(value: Any) -> bool:
    """Whether a value can identify an entry, though not as an integer."""
    if isinstance(value, int):
        return not isinstance(value, bool) and not is_integer(value)  # of more than 64 bits
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def _reference(value: Any, known: set[int], numbers: Mapping[str | float, int]) -> Any:
    """The integer id that an `image_id` or `category_id` stands for; the value itself if it stands for none."""
    if is_integer(value) and value in known:
        return value
    if _is_name(value) and value in numbers:
        return numbers[value]
    number = None if is_integer(value) else as_integer(value)
    return value if number is None else number


def as_integer(value: Any) -> int | None:
    """The integer that a number or text such as "7" or "7.0" is, None if it is none of 64 bits."""
    number = as_number(value)
    if isinstance(number, float):
        number = int(number) if number.is_integer() else None
    return number if number is not None and is_integer(number) else None


def as_number(value: Any) -> int | float | None:
    """The finite number that a number or text is, or None."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


# images


class ImageFiles:
    """Finds the files of an image folder under names that other machines and tools wrote."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._bases = list(dict.fromkeys((root.absolute(), root.resolve())))
        self._index: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The file that a name means, relative to the folder; None if there is none, or more than one.

        Tried are: the name itself; / for \\; what follows the folder's own name, for absolute paths and repeated
        folders; the path of a URL; and the same in other case or another Unicode form.
        """
        candidates = list(dict.fromkeys(self._candidates(name)))
        for candidate in candidates:
            if is_file(self.root / candidate):
                return candidate
        for candidate in candidates:
            found = self._similar(candidate)
            if len(found) == 1:
                return found[0]
        return None

    def _candidates(self, name: str) -> Iterator[str]:
        if "://" in name:
            try:
                parts = PurePosixPath(unquote(urlsplit(name).path)).parts[1:]
            except ValueError:
                return
            yield from ("/".join(parts[start:]) for start in range(len(parts) - 1))  # a name alone says too little
        else:
            path = name.replace("\\", "/")
            parts = PurePosixPath(path).parts
            inside = (Path(os.path.relpath(os.path.join(base, path), base)).as_posix() for base in self._bases)
            yield from (found for found in inside if not found.startswith(".."))
        names = {base.name for base in self._bases}
        if ".." not in parts:
            yield from ("/".join(parts[i + 1 :]) for i, part in enumerate(parts[:-1]) if part in names)

    def _similar(self, name: str) -> list[str]:
        if self._index is None:
            self._index = {}
            for folder, _, names in os.walk(self.root):
                for found in names:
                    path = (Path(folder) / found).relative_to(self.root).as_posix()
                    self._index.setdefault(_folded(path), []).append(path)
        return self._index.get(_folded(name), [])


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _normalize_image(image: dict[str, Any], files: ImageFiles, max_pixels: int, report: Report) -> None:
    """Correct the name and the size of an entry of `images` in place, where the image folder determines them."""
    name = image.get("file_name") or image.get("coco_url")
    if not isinstance(name, str) or not name:
        return
    fault = image_fault(image, max_pixels)
    unusable = None if fault is None or fault[0] == "size" else fault[0]  # no file_name, or one outside the folder
    if unusable or not is_file(files.root / name):
        found = files.find(name)
        if found is None:
            return
        image["file_name"] = found
        report(unusable or "missing file", f"{name} does not exist, but {found} does")
    if image_fault(image, max_pixels) is not None:
        _normalize_size(image, files.root / image["file_name"], max_pixels, report)


def _normalize_size(image: dict[str, Any], path: Path, max_pixels: int, report: Report) -> None:
    old = (image.get("width"), image.get("height"))
    stated = [as_integer(side) for side in old]
    try:
        header = read_header(path, max_pixels=max_pixels)
    except InputError:
        return
    size = (header.width, header.height)
    if any(side is not None and side > 0 and side != true for side, true in zip(stated, size)):
        return  # the file is another one than the annotations are about
    image["width"], image["height"] = size
    report("size", f"width and height {size[0]}, {size[1]} of the file, were {old[0]!r}, {old[1]!r}")


def _normalize_name(category: dict[str, Any], report: Report) -> None:
    name = category.get("name")
    if isinstance(name, (int, float)) and not isinstance(name, bool):
        category["name"] = str(name)
        report("category name", f"name '{name}', was a number")


# annotations


def _normalize_numbers(annotation: dict[str, Any], crowd: str, report: Report) -> None:
    """Correct `iscrowd`, `area` and `bbox` in place."""
    old = annotation.get("iscrowd", 0)
    if old not in (0, 1):
        new = _FLAGS.get(str(old).strip().lower(), 1)  # an unknown flag keeps the annotation out of training
        annotation["iscrowd"] = new
        report("iscrowd", f"iscrowd {new}, was {old!r}")
    if annotation.get("iscrowd") and crowd == "instance":
        annotation["iscrowd"] = 0
        report("many crowds", "iscrowd 0, was 1, because data.crowd is instance")
    area, box = annotation.get("area"), annotation.get("bbox")
    if isinstance(area, str) and as_number(area) is not None:
        annotation["area"] = as_number(area)
        report("area", f"area {annotation['area']}, was text")
    if isinstance(box, list) and any(isinstance(side, str) for side in box) and None not in map(as_number, box):
        annotation["bbox"] = [as_number(side) for side in box]
        report("box", f"bbox {annotation['bbox']}, was text")


def _normalize_segmentation(annotation: dict[str, Any], size: tuple[int, int], report: Report) -> None:
    fault = segmentation_fault(annotation, size)
    plain = _plain_segmentation(annotation.get("segmentation")) if fault is not None else None
    if plain is not None and segmentation_fault({"segmentation": plain}, size) is None:
        annotation["segmentation"] = plain
        report("segmentation", str(fault))


def _plain_segmentation(segmentation: Any) -> Any:
    """A segmentation with numbers for text, and with its lists of points as COCO nests them; None if it is neither."""
    if isinstance(segmentation, list) and len(segmentation) == 1 and isinstance(segmentation[0], dict):
        segmentation = segmentation[0]
    if isinstance(segmentation, dict):
        size, counts = ([as_integer(x) for x in value] if isinstance(value, list) else value
                        for value in (segmentation.get("size"), segmentation.get("counts")))  # fmt: skip
        return {**segmentation, "size": size, "counts": counts}
    if not isinstance(segmentation, list) or not segmentation:
        return None
    if not any(isinstance(part, (list, dict)) for part in segmentation):
        return [[as_number(value) for value in segmentation]]  # one polygon, not nested
    if not all(isinstance(polygon, list) for polygon in segmentation):
        return None
    if len(segmentation) > 2 and all(_is_point(point) for point in segmentation):
        segmentation = [segmentation]  # one polygon of points
    return [
        [as_number(value) for value in (itertools.chain(*polygon) if all(map(_is_point, polygon)) else polygon)]
        for polygon in segmentation
    ]


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and not any(isinstance(side, (list, dict)) for side in value)
