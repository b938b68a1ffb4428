"""COCO's JSON as other tools export it: Roboflow, CVAT, Label Studio, and files that were made by hand.

Areas, boxes, `iscrowd`, `info` and sizes of images may be missing; ids may be text; file names may be paths of another
machine. A folder may hold one file for each split, such as Roboflow's train/_annotations.coco.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from solov2.data.annotations import parse_json, require_instances
from solov2.errors import InputError
from solov2.formats import fields
from solov2.formats.annotated import AnnotatedImage, Losses, Reading, add_instance, short_name
from solov2.formats.image_folder import SPLITS, ImageFolder, split_of


def is_coco(content: Any) -> bool:
    """Whether parsed JSON may be COCO's instance format."""
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "annotations"))


def files_of(source: Path) -> Iterator[Path]:
    """The JSON files of a folder that may be COCO's: in it, in annotations/, and one level below it."""
    for pattern in ("*.json", "*/*.json"):
        yield from sorted(source.glob(pattern))


def read(source: Path, images: Path | None) -> Reading:
    """Read a file, or all files of a folder.

    Args:
        source: the JSON file or the folder.
        images: folder of the images; None: the folder, or that of the file (the parent of annotations/).

    Raises:
        InputError: a file is malformed.
    """
    place = source if source.is_dir() else source.parent
    folder = ImageFolder(images or (place.parent if place.name == "annotations" else place))
    losses = Losses()
    contents: list[tuple[Path, dict[str, Any]]] = []
    for path in files_of(source) if source.is_dir() else [source]:
        content = parse_json(path)
        if source.is_dir() and not is_coco(content):
            losses.add("JSON files of another format, left out", short_name(path, place))
        else:
            contents.append((path, require_instances(content, path)))
    names: dict[str, bool] = {}  # class name -> whether it has an annotation, or an id other than 0
    found: dict[str, AnnotatedImage] = {}
    for path, content in contents:
        classes = _categories(content, path, names)
        entries = _images(content, path, place, folder, losses)
        for image in entries.values():
            if image is not None and found.setdefault(image.file_name, image) is not image:
                raise InputError(f"{path} has the image {image.file_name} twice, or another file has it too")
        _read_annotations(content, path, place, classes, entries, losses)
    used = {instance.class_name for image in found.values() for instance in image.instances}
    for name, kept in names.items():
        losses.add("unused categories with id 0, left out", name, int(not kept and name not in used))
    folder.require_some(found.values(), losses)
    kept_names = [name for name, kept in names.items() if kept or name in used]
    return Reading(source, folder.root, kept_names, list(found.values()), losses)


def _categories(content: dict[str, Any], path: Path, names: dict[str, bool]) -> dict[Any, str]:
    """{id: name} of the categories; `names` is extended."""
    found: dict[Any, str] = {}
    for number, category in enumerate(fields.entries(content, "categories", str(path)), start=1):
        where = f"{path}, category {number}"
        name, key = fields.text(category, "name", where), _key(category, "id", where)
        if key in found or name in found.values():
            raise InputError(f"{where}: the id {key} or the name {name} occurs twice")
        found[key] = name
        names[name] = names.get(name, False) or key != "0"
    return found


def _key(entry: dict[str, Any], key: str, where: str) -> str:
    """An id as text, since some tools write numbers in one place and text in the other."""
    value = fields.text(entry, key, where)
    return value.removesuffix(".0").strip()


def _images(
    content: dict[str, Any], path: Path, place: Path, folder: ImageFolder, losses: Losses
) -> dict[str, AnnotatedImage | None]:
    """{id: image} of the images; None for those without a file."""
    found: dict[str, AnnotatedImage | None] = {}
    split = split_of_file(path, place)
    for number, entry in enumerate(fields.entries(content, "images", str(path)), start=1):
        where = f"{path}, image {number}"
        key, name = _key(entry, "id", where), fields.text(entry, "file_name", where)
        if key in found:
            raise InputError(f"{where}: the id {key} occurs twice")
        beside = f"{short_name(path.parent, place)}/{name}"
        file = folder.find_or_count(short_name(path, place), losses, name, beside)
        found[key] = None
        if file is not None:
            found[key] = folder.measure(file, where, stated=fields.size_of(entry, "height", "width"), split=split)
    return found


def split_of_file(path: Path, place: Path) -> str | None:
    """The split that an annotation file is of, by its folders below `place` and by its name; None if they say none."""
    words = re.split(r"[^a-z]+", path.stem.lower())
    return split_of(short_name(path, place)) or next((SPLITS[word] for word in words if word in SPLITS), None)


def _read_annotations(
    content: dict[str, Any],
    path: Path,
    place: Path,
    classes: dict[str, str],
    images: dict[str, AnnotatedImage | None],
    losses: Losses,
) -> None:
    for number, annotation in enumerate(fields.entries(content, "annotations", str(path)), start=1):
        where = f"{short_name(path, place)}, annotation {annotation.get('id', f'in place {number}')}"
        image_id, category = _key(annotation, "image_id", where), _key(annotation, "category_id", where)
        if image_id not in images or category not in classes:
            what = f"image {image_id}" if image_id not in images else f"category {category}"
            raise InputError(f"{where} belongs to {what}, which the file does not have")
        image, segmentation = images[image_id], annotation.get("segmentation")
        if not segmentation:
            losses.add("boxes without a mask, left out", where)
        elif image is not None:
            flat = isinstance(segmentation, list) and not any(isinstance(part, (list, dict)) for part in segmentation)
            crowd = annotation.get("iscrowd") in (1, True, "1")
            parts = [segmentation] if flat else segmentation
            add_instance(image, classes[category], parts, where, losses, crowd=crowd)
