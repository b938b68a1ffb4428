"""VGG Image Annotator 1 and 2: one JSON file, a project or its exported regions.

The class of a region is one of its attributes: the only one, or the first of `CLASS_ATTRIBUTES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from solov2.data.annotations import all_finite, parse_json
from solov2.errors import InputError
from solov2.formats import fields
from solov2.formats.annotated import AnnotatedImage, Losses, Reading, Segmentation, add_instance, used_classes
from solov2.formats.image_folder import ImageFolder
from solov2.formats.outlines import ellipse, rectangle

CLASS_ATTRIBUTES = ("class", "label", "category", "name", "type")
NO_CLASS = "object"  # in a file whose regions have no attributes
Region = tuple[str, dict[str, Any], dict[str, Any]]  # where, shape, attributes


def is_via(content: Any) -> bool:
    """Whether parsed JSON is a project or an export of VIA 1 or 2."""
    if not isinstance(content, dict):
        return False
    first = next(iter(content.values()), None)
    return "_via_img_metadata" in content or (isinstance(first, dict) and {"filename", "regions"} <= first.keys())


def read(source: Path, images: Path | None) -> Reading:
    """Read a file.

    Args:
        source: the JSON file.
        images: folder of the images; None: the folder of the file.

    Raises:
        InputError: the file is malformed, or nothing says which attribute is the class.
    """
    content = parse_json(source)
    if not is_via(content):
        raise InputError(f"{source} is not a file of the VGG Image Annotator 1 or 2")
    entries = fields.entry(content.get("_via_img_metadata", content), str(source))
    folder, losses, found = ImageFolder(images or source.parent), Losses(), dict[str, AnnotatedImage]()
    read: list[tuple[AnnotatedImage, list[Region]]] = []
    for key, value in entries.items():
        where = f"{source.name}, {key}"
        entry = fields.entry(value, where)
        file = folder.find_or_count(source.name, losses, fields.text(entry, "filename", where))
        if file is None:
            continue
        image = folder.measure(file, where)
        if found.setdefault(file, image) is not image:
            raise InputError(f"{where} is the file {file}, as an earlier entry is")
        read.append((image, _regions(entry, where)))
    attribute = _class_attribute([attributes for _, regions in read for *_, attributes in regions], source)
    for image, regions in read:
        for where, shape, attributes in regions:
            name = NO_CLASS if attribute is None else _class_name(attributes.get(attribute), where)
            segmentation = _segmentation(shape, where)
            if not name:
                losses.add(f"regions without the attribute {attribute}, left out", where)
            elif segmentation is None:
                losses.add(f"regions of the type {shape.get('name')}, which have no area, left out", where)
            else:
                losses.add("rectangles, taken as masks", where, int(shape["name"] == "rect"))
                losses.add(f"regions without attributes, of the class {NO_CLASS}", where, int(attribute is None))
                add_instance(image, name, segmentation, where, losses)
    folder.require_some(found.values(), losses)
    return Reading(source, folder.root, used_classes(found.values()), list(found.values()), losses)


def _regions(entry: dict[str, Any], where: str) -> list[Region]:
    regions = entry.get("regions")
    if isinstance(regions, dict):  # VIA 1
        entry = {"regions": list(regions.values())}
    found = []
    for number, region in enumerate(fields.entries(entry, "regions", where), start=1):
        place = f"{where}, region {number}"
        shape = fields.entry(region.get("shape_attributes"), f"{place}: shape_attributes")
        found.append((place, shape, fields.entry(region.get("region_attributes"), f"{place}: region_attributes")))
    return found


def _class_attribute(attributes: Iterable[dict[str, Any]], source: Path) -> str | None:
    """The attribute that has the class; None if no region has attributes."""
    names = list(dict.fromkeys(name for entry in attributes for name in entry))
    likely = [name for wanted in CLASS_ATTRIBUTES for name in names if name.lower() == wanted]
    if len(names) > 1 and not likely:
        raise InputError(
            f"the regions of {source} have the attributes {', '.join(names)}; rename the one with the class to 'class'"
        )
    return likely[0] if likely else names[0] if names else None


def _class_name(value: Any, where: str) -> str:
    """The class that an attribute states, as text or by checkboxes {name: true}; empty if it states none."""
    if isinstance(value, dict):
        chosen = [name for name, checked in value.items() if checked is True]
        if len(chosen) > 1:
            raise InputError(f"{where} has several classes: {', '.join(chosen)}")
        return chosen[0] if chosen else ""
    return str(value).strip() if isinstance(value, (str, int, float)) else ""


def _segmentation(shape: dict[str, Any], where: str) -> Segmentation | None:
    kind = shape.get("name")
    if kind == "polygon":
        x, y = shape.get("all_points_x"), shape.get("all_points_y")
        if not (isinstance(x, list) and isinstance(y, list) and len(x) == len(y) and all_finite([*x, *y])):
            raise InputError(f"{where}: all_points_x and all_points_y must be lists of numbers of one length")
        return [[float(value) for point in zip(x, y) for value in point]]
    if kind == "rect":
        left, top, width, height = fields.numbers(shape, where, "x", "y", "width", "height")
        return [rectangle(left, top, left + width, top + height)]
    if kind == "circle":
        x, y, radius = fields.numbers(shape, where, "cx", "cy", "r")
        return [ellipse(x, y, radius, radius)]
    if kind == "ellipse":
        x, y, radius_x, radius_y = fields.numbers(shape, where, "cx", "cy", "rx", "ry")
        [rotation] = fields.numbers(shape, where, "theta") if "theta" in shape else [0.0]
        return [ellipse(x, y, radius_x, radius_y, rotation)]
    return None
