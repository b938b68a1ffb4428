"""YOLO-segmentation: a `data.yaml`, and for each image a text file with a line for each instance.

A line is the number of the class and one polygon, x and y from 0 to 1. Parts of an instance are joined by bridges, as
ultralytics does, and so are holes. Lines of five numbers are boxes, which are not masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from solov2.data.annotations import is_file, is_outside
from solov2.errors import InputError, count
from solov2.formats.annotated import AnnotatedImage, Losses, Reading, add_instance, output_path, short_name
from solov2.formats.fields import class_names, read_lines
from solov2.formats.image_folder import ImageFolder
from solov2.formats.outlines import as_one_polygon
from solov2.outputs import check_outputs, replace_file
from solov2.yaml_file import read_yaml

SPLITS = ("train", "val", "test")
DIGITS = 3  # of a pixel, which restores coordinates that were divided by the size of the image
TOLERANCE = 0.1  # how far beyond the image a point may be, in parts of its side; it is moved to the border


def find_table(source: Path) -> Path | None:
    """The file with the class names: `source` itself, or the data.yaml, another YAML file or classes.txt in it."""
    if source.is_file():
        return source if source.suffix.lower() in (".yaml", ".yml") else None
    named = [source / name for name in ("data.yaml", "dataset.yaml", "classes.txt")]
    others = sorted(path for path in source.glob("*.y*ml") if path not in named)
    for path in [*named[:2], *others]:
        if path.is_file() and "names" in _settings(path):
            return path
    return named[2] if named[2].is_file() and (source / "labels").is_dir() else None


def _settings(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    return content if isinstance(content, dict) else {}


def read(source: Path, images: Path | None) -> Reading:
    """Read a dataset.

    Args:
        source: its data.yaml, or the folder of that file; a folder with classes.txt and labels/ is read, too.
        images: the folder that holds images/, or the images themselves; None: the folder of data.yaml.

    Raises:
        InputError: a file is malformed, or a folder that data.yaml names does not exist.
    """
    table = find_table(source)
    if table is None:
        raise InputError(f"{source} has no data.yaml with `names`, and no classes.txt beside labels/")
    settings = {"names": read_lines(table)} if table.suffix == ".txt" else _settings(table)
    names = class_names(settings.get("names"), f"`names` of {table}")
    number = settings.get("nc", len(names))
    if number != len(names):
        raise InputError(f"{table} has nc: {number}, but {count(len(names), 'class name')}")
    if "kpt_shape" in settings:
        raise InputError(f"{table} is a dataset of keypoints (kpt_shape), which have no masks")
    folder, losses = ImageFolder(images or table.parent), Losses()
    found: dict[str, AnnotatedImage] = {}
    for split, listed in _listed(settings, table, folder, losses):
        name = folder.find_or_count(f"{split or 'the dataset'} of {table.name}", losses, listed)
        if name in found:
            losses.add("images of two splits, kept in the first", f"{name} in {split}")
        elif name is not None:
            found[name] = folder.measure(name, str(table), split=split)
            _read_labels(found[name], _label_file(table.parent, folder.root, listed, name), names, table, losses)
    folder.require_some(found.values(), losses)
    return Reading(source, folder.root, names, list(found.values()), losses)


def _listed(
    settings: dict[str, Any], table: Path, folder: ImageFolder, losses: Losses
) -> Iterator[tuple[str | None, str]]:
    """The images that the dataset names, with their split."""
    splits: dict[str | None, Any] = {split: settings[split] for split in SPLITS if settings.get(split)}
    splits = splits or {None: "images" if (folder.root / "images").is_dir() else "."}
    everything = folder.files()
    base = settings.get("path", ".")
    for split, places in splits.items():
        for place in places if isinstance(places, list) else [places]:
            if not isinstance(place, str) or not isinstance(base, str):
                raise InputError(f"{table}: `{split}` must be a folder, a list of folders or a text file")
            if place.endswith(".txt"):
                yield from ((split, name) for name in _list_file(place, base, table))
                continue
            inside = _inside(folder.root, base, place)
            if inside is None:
                raise InputError(
                    f"{table} has {split}: {place}, which is no folder in {folder.root}; name the folder that holds it "
                    "with --images"
                )
            yield from ((split, name) for name in everything if PurePosixPath(name).is_relative_to(inside))


def _inside(root: Path, base: str, place: str) -> str | None:
    """The folder below `root` that a path of a data.yaml means: the longest end of it that exists."""
    path = PurePosixPath(base.replace("\\", "/"), place.replace("\\", "/"))
    parts = [part for part in path.parts if part not in ("/", "..", ".")]
    ends = ["/".join(parts[start:]) or "." for start in range(len(parts) + (place == "."))]
    return next((end for end in ends if (root / end).is_dir()), None)


def _list_file(place: str, base: str, table: Path) -> list[str]:
    """The lines of a text file that lists images."""
    names = (str(PurePosixPath(base, place)), place, PurePosixPath(place).name)
    path = next((table.parent / name for name in names if not is_outside(name) and is_file(table.parent / name)), None)
    if path is None:
        raise InputError(f"{table} names the list of images {place}, which is not in {table.parent}")
    return [line.strip() for line in read_lines(path) if line.strip()]


def _label_file(place: Path, root: Path, *names: str) -> Path | None:
    """The label file of an image, under the name that the dataset has for it and under that of the file."""
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        parts = [part for part in path.with_suffix(".txt").parts if part not in ("/", "..", ".")]
        at = max((number for number, part in enumerate(parts[:-1]) if part == "images"), default=None)
        inside = parts if at is None else [*parts[:at], "labels", *parts[at + 1 :]]
        ends = ["/".join(inside[start:]) for start in range(1 if at is None else at + 1)]
        for end in [*ends, *(f"labels/{'/'.join(parts[start:])}" for start in range(len(parts)) if at is None)]:
            found = next((folder / end for folder in (root, place) if is_file(folder / end)), None)
            if found is not None:
                return found
    return None


def _read_labels(image: AnnotatedImage, path: Path | None, names: Sequence[str], table: Path, losses: Losses) -> None:
    if path is None:
        losses.add("images without a label file, taken as images without objects", image.file_name)
        return
    for number, line in enumerate(read_lines(path), start=1):
        where, words = f"{short_name(path, table.parent)}, line {number}", line.split()
        if not words:
            continue
        try:
            label, *values = map(float, words)
        except ValueError:
            raise InputError(f"{where}: not a line of numbers") from None
        if not all(map(math.isfinite, (label, *values))):
            raise InputError(f"{where}: a number is not finite")
        if label not in range(len(names)):
            raise InputError(f"{where}: class {words[0]}, but {table} names the classes 0 to {len(names) - 1}")
        if len(values) in (4, 5):
            losses.add("boxes without a mask, left out", where)
            continue
        if len(values) < 4:
            raise InputError(f"{where}: a polygon needs at least three points")
        if len(values) % 2:
            losses.add("confidences after a polygon, left out", where)
            values.pop()
        clipped = [min(max(value, 0.0), 1.0) for value in values]
        if max(abs(old - new) for old, new in zip(values, clipped)) > TOLERANCE:
            raise InputError(f"{where}: coordinates must be from 0 to 1, in parts of the width and height")
        losses.add("polygons beyond the image, cut off at its border", where, int(clipped != values))
        sides = (image.width, image.height)
        polygon = [round(value * sides[place % 2], DIGITS) for place, value in enumerate(clipped)]
        add_instance(image, names[int(label)], [polygon], where, losses)


def lines(image: AnnotatedImage, names: Sequence[str], losses: Losses) -> list[str]:
    """The lines of the label file of an image; crowds are left out."""
    found, size = [], (image.height, image.width)
    for number, instance in enumerate(image.instances, start=1):
        where = f"{image.file_name}, instance {number}"
        if instance.is_crowd:
            losses.add("crowds, left out", where)
            continue
        polygon, parts, has_holes = as_one_polygon(instance.segmentation, size)
        losses.add("instances of several parts, joined by bridges", where, int(parts > 1))
        losses.add("masks with holes, written as one outline with bridges to the holes", where, int(has_holes))
        values = (value / (image.height if place % 2 else image.width) for place, value in enumerate(polygon))
        found.append(" ".join([str(names.index(instance.class_name)), *(f"{value:.9g}" for value in values)]))
    return found


def write(
    images: Iterable[AnnotatedImage],
    names: Sequence[str],
    folder: Path,
    *,
    flag: str = "--output",
    overwrite: bool = False,
) -> Losses:
    """Write data.yaml, lists of the images of each split, and label files below labels/.

    The images are expected below images/, with their `file_name`; they are not copied.

    Args:
        images: what to write; those without a split belong to "train".
        names: the classes, in the order of their numbers.
        folder: where to write.
        flag: the argument that names the folder, for messages.
        overwrite: replace existing files.

    Returns:
        What the format cannot hold.

    Raises:
        InputError: a file exists, or two images would have the same one.
    """
    losses, lists = Losses(), dict[str, list[str]]()
    texts: dict[Path, str] = {}
    for image in images:
        path = output_path(folder / "labels", image, ".txt")
        if path in texts:
            raise InputError(f"two images have the name {image.file_name} except for the extension; rename one of them")
        texts[path] = "".join(f"{line}\n" for line in lines(image, names, losses))
        lists.setdefault(image.split or "train", []).append(f"./images/{image.file_name}\n")
    texts |= {folder / f"{split}.txt": "".join(listed) for split, listed in lists.items()}
    table = {"path": ".", **{split: f"{split}.txt" for split in lists}, "names": dict(enumerate(names))}
    texts[folder / "data.yaml"] = yaml.safe_dump(table, sort_keys=False, allow_unicode=True)
    check_outputs([(flag, path) for path in texts], overwrite=overwrite)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(text.encode())
    return losses
