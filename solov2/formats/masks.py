"""Masks in PNGs, one for each image, in which a pixel has the number of its instance; overlaps cannot be held.

Three styles are read, and the last is written:

VOC         SegmentationObject/ has instance numbers and SegmentationClass/ the classes of the same pixels, both with a
            palette: 0 is background and 255 is ignored. ImageSets/Segmentation/ has the splits.
Cityscapes  *_gtFine_instanceIds.png, 16 bits: 1000 * class + instance. Numbers below 1000 are regions of a class.
numbered    classes.txt has a name in each line, and masks/ has PNGs of 1000 * line + instance: gray with 8 or 16 bits,
            or RGB with R + 256 G + 65536 B. Instance 0 is a crowd. Of a single class, any numbers are instances.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from solov2.errors import InputError
from solov2.formats.annotated import (
    AnnotatedImage,
    Losses,
    Reading,
    Segmentation,
    add_instance,
    compressed,
    output_path,
    short_name,
)
from solov2.formats.fields import class_names, read_lines
from solov2.formats.image_folder import MISSING, ImageFolder, split_of
from solov2.ops.image_files import open_image
from solov2.ops.masks import decode_rle, rle_from_columns
from solov2.ops.panoptic import ids_from_rgb, rgb_from_ids
from solov2.outputs import check_outputs, replace_file, write_picture

VOC_CLASSES = tuple(
    (
        "aeroplane|bicycle|bird|boat|bottle|bus|car|cat|chair|cow|diningtable|dog|horse|motorbike|person|pottedplant|"
        "sheep|sofa|train|tvmonitor"
    ).split("|")
)
CITYSCAPES = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
NOT_EVALUATED = (29, 30)  # caravan, trailer: have instances, but belong to no class of the benchmark
CITYSCAPES_ENDING = "_gtFine_instanceIds.png"
VOID = 255
PER_CLASS = 1000  # numbers of instances


def read_voc(source: Path, images: Path | None) -> Reading:
    """Read VOC's masks below a folder, such as VOC2012/; classes.txt in it replaces VOC's 20 names.

    Args:
        source: has SegmentationObject/ and SegmentationClass/.
        images: folder of the images; None: JPEGImages/ in the source.

    Raises:
        InputError: a file is missing or malformed.
    """
    objects, classes = source / "SegmentationObject", source / "SegmentationClass"
    table = source / "classes.txt"
    names = class_names(read_lines(table), str(table)) if table.is_file() else list(VOC_CLASSES)
    folder, losses, found = ImageFolder(images or source / "JPEGImages"), Losses(), []
    splits = dict(_voc_splits(source))
    for path in sorted(objects.rglob("*.png")):
        stem = short_name(path.with_suffix(""), objects)
        image = _image_of(stem, path, folder, losses, splits.get(stem))
        if image is None:
            continue
        numbers = _read_numbers(path, image, palette=True)
        kinds = _read_numbers(classes / path.relative_to(objects), image, palette=True)
        for number, rle, where in _instances(numbers, path):
            if number == VOID:
                continue
            inside = kinds[numbers == number]
            label = int(np.bincount(inside[(inside != 0) & (inside != VOID)], minlength=1).argmax())
            if not 1 <= label <= len(names):
                raise InputError(f"{where} has the class {label} in SegmentationClass, but there are {len(names)}")
            add_instance(image, names[label - 1], rle, where, losses)
        found.append(image)
    folder.require_some(found, losses)
    return Reading(source, folder.root, names, found, losses)


def _voc_splits(source: Path) -> Iterator[tuple[str, str]]:
    for split in ("test", "val", "train"):  # the last one counts
        path = source / "ImageSets" / "Segmentation" / f"{split}.txt"
        if path.is_file():
            yield from ((line.split()[0], split) for line in read_lines(path) if line.strip())


def read_cityscapes(source: Path, images: Path | None) -> Reading:
    """Read the masks of Cityscapes, of its eight classes of things.

    Args:
        source: gtFine/, or the folder of gtFine/ and leftImg8bit/.
        images: folder of the images; None: leftImg8bit/ in the source or beside it.

    Raises:
        InputError: a file is missing or malformed.
    """
    places = [images] if images else [source / "leftImg8bit", source.parent / "leftImg8bit", source]
    folder = ImageFolder(next((place for place in places if place.is_dir()), places[0]))
    losses, found = Losses(), []
    for path in sorted(source.rglob(f"*{CITYSCAPES_ENDING}")):
        name = path.name.removesuffix(CITYSCAPES_ENDING)
        stem = "/".join((*path.parent.parts[-2:], name))
        image = _image_of(f"{stem}_leftImg8bit", path, folder, losses, split_of(path.as_posix()), stem)
        if image is None:
            continue
        for number, rle, where in _instances(_read_numbers(path, image), path):
            crowd = number < PER_CLASS
            label = CITYSCAPES.get(number if crowd else number // PER_CLASS)
            if label is not None:
                add_instance(image, label, rle, where, losses, crowd=crowd)
                losses.add("regions of several objects, taken as crowds", where, int(crowd))
            elif number // PER_CLASS in NOT_EVALUATED:
                losses.add("caravans and trailers, which are not evaluated, left out", where)
            elif not crowd:
                raise InputError(f"{where} has the number {number}, which belongs to no thing class of Cityscapes")
        found.append(image)
    folder.require_some(found, losses)
    return Reading(source, folder.root, list(CITYSCAPES.values()), found, losses)


def read_numbered(source: Path, images: Path | None) -> Reading:
    """Read a folder with classes.txt and masks/, as `write` writes it.

    Args:
        source: the folder.
        images: folder of the images; None: images/ in the source.

    Raises:
        InputError: a file is missing or malformed.
    """
    table, masks = source / "classes.txt", source / "masks"
    names = class_names([line for line in read_lines(table) if line.strip()], str(table))
    folder, losses = ImageFolder(images or source / "images"), Losses()
    read: list[tuple[AnnotatedImage, list[tuple[int, Segmentation, str]]]] = []
    for path in sorted(masks.rglob("*.png")):
        stem = short_name(path.with_suffix(""), masks)
        image = _image_of(stem, path, folder, losses, split_of(f"{stem}.png"))
        if image is not None:
            read.append((image, list(_instances(_read_numbers(path, image), path))))
    numbers = [number for _, instances in read for number, _, _ in instances]
    plain = len(names) == 1 and any(number // PER_CLASS != 1 for number in numbers)
    for image, instances in read:
        for number, rle, where in instances:
            label, instance = (1, number) if plain else divmod(number, PER_CLASS)
            if not 1 <= label <= len(names):
                raise InputError(
                    f"{where}: the number {number} is of class {label} (number / {PER_CLASS}), but {table} has "
                    f"{len(names)} classes"
                )
            add_instance(image, names[label - 1], rle, where, losses, crowd=instance == 0)
    found = [image for image, _ in read]
    folder.require_some(found, losses)
    return Reading(source, folder.root, names, found, losses)


def _image_of(
    stem: str, path: Path, folder: ImageFolder, losses: Losses, split: str | None, *other: str
) -> AnnotatedImage | None:
    name = next((found for found in map(folder.find_stem, (stem, *other)) if found is not None), None)
    if name is None:
        losses.add(MISSING, f"{stem} of {path}")
        return None
    return folder.measure(name, str(path), split=split)


def _read_numbers(path: Path, image: AnnotatedImage, *, palette: bool = False) -> np.ndarray:
    """The numbers of a PNG: int64 [h, w]; those of its palette, not its colors."""
    with open_image(path) as picture:
        if picture.format != "PNG":
            raise InputError(f"{path} is a {picture.format} file; masks must be in a PNG")
        if (picture.height, picture.width) != (image.height, image.width):
            raise InputError(
                f"{path} is {picture.width} x {picture.height}, but {image.file_name} is {image.width} x {image.height}"
            )
        allowed = ("P", "L") if palette else ("P", "L", "1", "I", "I;16", "RGB")
        if picture.mode not in allowed:
            raise InputError(f"{path} has the pixel format {picture.mode}, but masks need one of {', '.join(allowed)}")
        pixels = np.asarray(picture)
    return ids_from_rgb(pixels).astype(np.int64) if pixels.ndim == 3 else pixels.astype(np.int64)


def _instances(numbers: np.ndarray, path: Path) -> Iterator[tuple[int, Segmentation, str]]:
    """(number, RLE, where) of every number but 0."""
    order = np.argsort(numbers, axis=None, kind="stable")  # one pass, however many numbers there are
    values, starts = np.unique(numbers.ravel()[order], return_index=True)
    for value, places in zip(values.tolist(), np.split(order, starts[1:])):
        if value:
            rows, columns = np.divmod(places, numbers.shape[1])
            top, left = int(rows.min()), int(columns.min())
            window = np.zeros((int(columns.max()) - left + 1, int(rows.max()) - top + 1), dtype=bool)
            window[columns - left, rows - top] = True
            rle, _ = rle_from_columns(window, (top, left), (numbers.shape[0], numbers.shape[1]))
            yield value, rle, f"{path}, number {value}"


def numbers_of(image: AnnotatedImage, names: Sequence[str], losses: Losses) -> np.ndarray:
    """The numbers of the pixels of an image: int64 [h, w]; later instances cover earlier ones.

    Raises:
        InputError: there are more than 999 instances of a class.
    """
    size = (image.height, image.width)
    plane = np.zeros(size, dtype=np.int64)
    used, written = dict.fromkeys(names, 0), dict[int, str]()
    for number, instance in enumerate(image.instances, start=1):
        where, name = f"{image.file_name}, instance {number}", instance.class_name
        used[name] += not instance.is_crowd
        if used[name] >= PER_CLASS:
            raise InputError(f"{image.file_name} has more than {PER_CLASS - 1} instances of {name}, too many for a PNG")
        rle = compressed(instance.segmentation, size)
        mask = decode_rle({"size": [*size], "counts": rle["counts"]}).numpy() > 0
        losses.add("pixels of overlaps, kept by the last instance", where, int((plane[mask] > 0).sum()))
        value = PER_CLASS * (names.index(name) + 1) + (0 if instance.is_crowd else used[name])
        plane[mask] = value
        written[value] = where
    left = set(np.unique(plane).tolist())
    for value, where in written.items():
        losses.add("instances covered entirely by later ones, or empty", where, int(value not in left))
    return plane


def write(
    images: Iterable[AnnotatedImage],
    names: Sequence[str],
    folder: Path,
    *,
    flag: str = "--output",
    overwrite: bool = False,
) -> Losses:
    """Write classes.txt, and an RGB PNG of numbers for each image below masks/.

    Args:
        images: what to write.
        names: the classes, in the order of their numbers.
        folder: where to write.
        flag: the argument that names the folder, for messages.
        overwrite: replace existing files.

    Returns:
        What the format cannot hold.

    Raises:
        InputError: a file exists, two images would have the same one, or there are too many instances.
    """
    losses, images, table = Losses(), list(images), folder / "classes.txt"
    broken = next((name for name in names if len(name.splitlines()) != 1), None)
    if broken is not None:
        raise InputError(f"the class name {broken!r} cannot be a line of {table}")
    paths = [output_path(folder / "masks", image, ".png") for image in images]
    check_outputs([(flag, path) for path in (table, *paths)], overwrite=overwrite)
    table.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(table) as file:
        file.write("".join(f"{name}\n" for name in names).encode())
    for image, path in zip(images, paths):
        write_picture(path, Image.fromarray(rgb_from_ids(numbers_of(image, names, losses))))
    return losses
