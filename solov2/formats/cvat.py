"""CVAT for images 1.1: one XML file with the shapes of all images; a `group_id` joins the parts of an instance."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from solov2.errors import InputError
from solov2.formats.annotated import AnnotatedImage, Losses, Reading, Segmentation, add_instance, merged, used_classes
from solov2.formats.image_folder import ImageFolder, split_of
from solov2.formats.outlines import ellipse, rectangle, turned
from solov2.ops.masks import rle_from_columns

SHAPES = ("polygon", "box", "ellipse", "mask", "polyline", "points", "cuboid", "skeleton", "tag")
FILE_NAME = "annotations.xml"  # in a folder that CVAT has exported


class _Plain(ElementTree.TreeBuilder):
    """Refuses a document type, and with it entities, which could stand for gigabytes or for other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise InputError("has a document type (<!DOCTYPE), which annotations do not need; it is not read")


def parse(path: Path) -> ElementTree.Element:
    """The root of an XML file without a document type.

    Raises:
        InputError: the file is not such XML.
    """
    try:
        return ElementTree.parse(path, ElementTree.XMLParser(target=_Plain())).getroot()
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path} is not valid XML; it may be truncated ({error})") from error


def read(source: Path, images: Path | None) -> Reading:
    """Read annotations.xml.

    Args:
        source: the file, or its folder.
        images: folder of the images; None: the folder of the file.

    Raises:
        InputError: the file is malformed, or of a video.
    """
    path = source / FILE_NAME if source.is_dir() else source
    document = parse(path)
    if document.find("track") is not None:
        raise InputError(f"{path} is CVAT for video; export the task as CVAT for images")
    if document.find("image") is None:
        raise InputError(f"{path} has no <image>, so it is not CVAT for images")
    folder, losses, found = ImageFolder(images or path.parent), Losses(), dict[str, AnnotatedImage]()
    for number, element in enumerate(document.iterfind("image"), start=1):
        name = element.get("name", "")
        where = f"{path.name}, image {number} ({name})"
        file = folder.find_or_count(path.name, losses, name, f"images/{name}")
        if file is None:
            continue
        width, height = _numbers(element, where, "width", "height")
        split = split_of(f"{element.get('subset', '')}/{name}")
        image = folder.measure(file, where, stated=(int(height), int(width)), split=split)
        if found.setdefault(file, image) is not image:
            raise InputError(f"{where} is the file {file}, as an earlier image is")
        _read_shapes(element, image, where, losses)
    listed = [label.text or "" for label in document.iterfind("meta//labels/label/name")]
    names = list(dict.fromkeys([*listed, *used_classes(found.values())]))
    folder.require_some(found.values(), losses)
    return Reading(source, folder.root, names, list(found.values()), losses)


def _read_shapes(element: ElementTree.Element, image: AnnotatedImage, where: str, losses: Losses) -> None:
    groups: dict[tuple[str, str], tuple[list[Segmentation], str]] = {}
    for number, shape in enumerate(element, start=1):
        place, label = f"{where}, shape {number}", shape.get("label", "")
        if shape.tag not in SHAPES:
            continue
        if not label:
            raise InputError(f"{place} has no label")
        segmentation = _segmentation(shape, image, place)
        if segmentation is None:
            losses.add(f"shapes of the type {shape.tag}, which have no area, left out", place)
            continue
        losses.add("rectangles, taken as masks", place, int(shape.tag == "box"))
        group = shape.get("group_id") or "0"
        key = (label, f"group {group}" if group != "0" else f"shape {number}")
        parts, first = groups.get(key, ([], place))
        groups[key] = [*parts, segmentation], first
    for (label, _), (parts, place) in groups.items():
        add_instance(image, label, merged(parts, (image.height, image.width), place), place, losses)


def _segmentation(shape: ElementTree.Element, image: AnnotatedImage, where: str) -> Segmentation | None:
    if shape.tag == "polygon":
        points = shape.get("points", "").replace(";", ",").split(",")
        return [[_number(value, where) for value in points]]
    rotation = math.radians(_number(shape.get("rotation", "0"), where))
    if shape.tag == "box":
        x1, y1, x2, y2 = _numbers(shape, where, "xtl", "ytl", "xbr", "ybr")
        return [turned(rectangle(x1, y1, x2, y2), (x1 + x2) / 2, (y1 + y2) / 2, rotation)]
    if shape.tag == "ellipse":
        x, y, radius_x, radius_y = _numbers(shape, where, "cx", "cy", "rx", "ry")
        return [turned(ellipse(x, y, radius_x, radius_y), x, y, rotation)]
    return _mask(shape, image, where) if shape.tag == "mask" else None


def _mask(shape: ElementTree.Element, image: AnnotatedImage, where: str) -> Segmentation:
    """A mask of a window: run lengths along its rows, starting with background."""
    left, top, width, height = (int(value) for value in _numbers(shape, where, "left", "top", "width", "height"))
    lengths = [int(_number(value, where)) for value in shape.get("rle", "").split(",")]
    inside = left >= 0 and top >= 0 and left + width <= image.width and top + height <= image.height
    if not inside or min(width, height) < 1 or min(lengths) < 0 or sum(lengths) != width * height:
        raise InputError(f"{where}: the runs of the mask do not fit its window, or the window does not fit the image")
    window = np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(height, width)
    return rle_from_columns(window.T > 0, (top, left), (image.height, image.width))[0]


def _numbers(element: ElementTree.Element, where: str, *keys: str) -> list[float]:
    return [_number(element.get(key, ""), f"{where}: {key}") for key in keys]


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: {text!r} is not a number")
    return value
