"""labelme: one JSON file for each image, with a list of `shapes`; a `group_id` joins the parts of an instance.

Read are polygons, rectangles, circles and masks. Written are polygons, with the holes of a mask bridged and crowds
marked by the flag `iscrowd` of their shapes.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from solov2.data.annotations import is_file, parse_json
from solov2.errors import InputError
from solov2.formats import fields
from solov2.formats.annotated import (
    AnnotatedImage,
    Losses,
    Reading,
    Segmentation,
    add_instance,
    merged,
    output_path,
    short_name,
    used_classes,
)
from solov2.formats.image_folder import MISSING, ImageFolder
from solov2.formats.outlines import as_polygons, ellipse, rectangle
from solov2.ops.image_files import open_image
from solov2.ops.masks import encode_rle
from solov2.outputs import check_outputs, write_json

VERSION = "5.5.0"  # of labelme, whose format is written
NOT_OBJECTS = ("_background_", "__ignore__")  # labels that labelme's own converters leave out


def is_labelme(content: Any) -> bool:
    """Whether parsed JSON is a file of labelme."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def read(source: Path, images: Path | None) -> Reading:
    """Read a file, or all files of a folder and its subfolders.

    Args:
        source: the JSON file or the folder.
        images: folder of the images; None: the folder of the JSON files.

    Raises:
        InputError: a file is malformed, or an image is outside the folder or of another size than stated.
    """
    place = source if source.is_dir() else source.parent
    folder, losses = ImageFolder(images or place), Losses()
    found: dict[str, tuple[Path, AnnotatedImage]] = {}
    for path in sorted(source.rglob("*.json")) if source.is_dir() else [source]:
        content = parse_json(path)
        if not is_labelme(content):
            losses.add("JSON files of another format, left out", short_name(path, place))
            continue
        image = _image(content, path, place, folder, losses)
        if image is None:
            continue
        if image.file_name in found:
            raise InputError(f"{path} and {found[image.file_name][0]} annotate the same image, {image.file_name}")
        found[image.file_name] = path, image
        _read_shapes(content, image, short_name(path, place), losses)
    annotated = [image for _, image in found.values()]
    folder.require_some(annotated, losses)
    return Reading(source, folder.root, used_classes(annotated), annotated, losses)


def _image(
    content: dict[str, Any], path: Path, place: Path, folder: ImageFolder, losses: Losses
) -> AnnotatedImage | None:
    name = fields.text(content, "imagePath", str(path)).replace("\\", "/")
    beside = os.path.relpath(os.path.join(path.parent, name), folder.root).replace(os.sep, "/")
    where = short_name(path, place)
    found = folder.find(beside, name)
    if found is None:
        if is_file(path.parent / name):
            raise InputError(f"{path} refers to {name}, which is outside {folder.root}; name its folder with --images")
        within = " (it is inside the JSON file, as imageData; save it first)" if content.get("imageData") else ""
        losses.add(MISSING, f"{name} of {where}{within}")
        return None
    return folder.measure(found, str(path), stated=fields.size_of(content, "imageHeight", "imageWidth"))


def _read_shapes(content: dict[str, Any], image: AnnotatedImage, where: str, losses: Losses) -> None:
    groups: dict[tuple[str, str], tuple[list[Segmentation], bool, str]] = {}
    for number, shape in enumerate(fields.entries(content, "shapes", where), start=1):
        place = f"{where}, shape {number}"
        label = fields.text(shape, "label", place)
        kind = shape.get("shape_type") or "polygon"  # null in old files
        if label in NOT_OBJECTS:
            losses.add(f"shapes labeled {label}, left out", place)
            continue
        segmentation = _segmentation(shape, kind, image, place)
        if segmentation is None:
            losses.add(f"shapes of the type {kind}, which have no area, left out", place)
            continue
        losses.add("rectangles, taken as masks", place, int(kind == "rectangle"))
        group, flags = shape.get("group_id"), shape.get("flags")
        key = (label, f"group {group}" if group is not None else f"shape {number}")
        crowd = isinstance(flags, dict) and flags.get("iscrowd") is True
        parts, _, first = groups.get(key, ([], crowd, place))
        groups[key] = [*parts, segmentation], crowd, first
    size = (image.height, image.width)
    for (label, _), (parts, crowd, place) in groups.items():
        add_instance(image, label, merged(parts, size, place), place, losses, crowd=crowd)


def _segmentation(shape: dict[str, Any], kind: str, image: AnnotatedImage, where: str) -> Segmentation | None:
    """The segmentation of a shape, None if its type has no area."""
    if kind not in ("polygon", "rectangle", "circle", "mask"):
        return None
    points = fields.flat_points(shape.get("points"), where)
    if kind == "polygon":
        return [points]
    if len(points) < 4:
        raise InputError(f"{where}: a {kind} needs two points")
    if kind == "rectangle":
        return [rectangle(min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2]))]
    if kind == "circle":  # the center, and a point of the border
        radius = math.dist(points[:2], points[2:4])
        return [ellipse(points[0], points[1], radius, radius)]
    return _decode_mask(shape.get("mask"), (round(points[0]), round(points[1])), image, where)


def _decode_mask(data: Any, corner: tuple[int, int], image: AnnotatedImage, where: str) -> Segmentation:
    """A mask that is stored as a PNG in base64, with its upper left corner at x, y."""
    try:
        png = base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise InputError(f"{where}: the mask is not a PNG in base64") from None
    with open_image(png, max_pixels=4 * image.height * image.width) as picture:
        window = np.asarray(picture.convert("L")) > 0
    x, y = corner
    plane = np.zeros((image.height, image.width), dtype=np.uint8)
    top, left = max(y, 0), max(x, 0)
    inside = window[top - y : max(image.height - y, 0), left - x : max(image.width - x, 0)]
    plane[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return encode_rle(torch.from_numpy(plane)[None])[0]


def document(image: AnnotatedImage, image_path: str, losses: Losses) -> dict[str, Any]:
    """The content of the JSON file of an image; `image_path` is relative to the file."""
    shapes = []
    for number, instance in enumerate(image.instances, start=1):
        where = f"{image.file_name}, instance {number}"
        parts, has_holes = as_polygons(instance.segmentation, (image.height, image.width))
        losses.add("masks with holes, written as one outline with bridges to the holes", where, int(has_holes))
        losses.add("crowds, written as shapes with the flag iscrowd", where, int(instance.is_crowd))
        group = number if len(parts) > 1 else None
        shapes += [_shape(instance.class_name, part, group, instance.is_crowd) for part in parts]
    return {
        "version": VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": image.height,
        "imageWidth": image.width,
    }


def _shape(label: str, part: list[float], group: int | None, crowd: bool) -> dict[str, Any]:
    return {
        "label": label,
        "points": [list(point) for point in zip(part[::2], part[1::2])],
        "group_id": group,
        "description": "",
        "shape_type": "polygon",
        "flags": {"iscrowd": True} if crowd else {},
    }


def write(
    images: Iterable[AnnotatedImage], root: Path, folder: Path, *, flag: str = "--output", overwrite: bool = False
) -> Losses:
    """Write a JSON file for each image, below `folder` as the image is below `root`.

    Args:
        images: what to write.
        root: the folder of the image files, which the written files refer to; they are not copied.
        folder: where to write.
        flag: the argument that names the folder, for messages.
        overwrite: replace existing files.

    Returns:
        What the format cannot hold.

    Raises:
        InputError: a file exists, or two images would have the same one.
    """
    losses, images = Losses(), list(images)
    paths = [output_path(folder, image, ".json") for image in images]
    check_outputs([(flag, path) for path in paths], overwrite=overwrite)
    for image, path in zip(images, paths):
        relative = os.path.relpath((root / image.file_name).absolute(), path.parent.absolute())
        write_json(path, document(image, relative.replace(os.sep, "/"), losses), indent=1)
    return losses
