"""What all formats have in common: images with instances of named classes, each a COCO segmentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pycocotools.mask as coco_mask

from solov2.data.annotations import find_problems, is_outside
from solov2.errors import InputError
from solov2.ops.masks import check_segmentation, segmentation_to_rle

Polygons = list[list[float]]  # of one instance, each x0, y0, x1, y1, ... in pixels
Segmentation = Polygons | dict[str, Any]  # or RLE, compressed or not


@dataclass(frozen=True)
class AnnotatedInstance:
    """An object, or with `is_crowd` a region of many."""

    class_name: str
    segmentation: Segmentation
    is_crowd: bool = False


@dataclass(frozen=True)
class AnnotatedImage:
    """An image file and its instances; `split` is "train", "val", "test", ... where the source says so."""

    file_name: str  # relative to the folder of the images, with /
    height: int
    width: int
    instances: list[AnnotatedInstance] = field(default_factory=list)
    split: str | None = None


class Losses:
    """What was left out or changed: for each kind, how often, and where first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, kind: str, where: str, number: int = 1) -> None:
        """Count a kind, such as "boxes without a mask, left out"; `where` is a file and an entry of it."""
        if number:
            self.counts[kind] += number
            self.first.setdefault(kind, where)

    def lines(self) -> list[str]:
        """One line for each kind, the most frequent first."""
        return [f"{number:,} {kind} (first: {self.first[kind]})" for kind, number in self.counts.most_common()]


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        source: the file or folder.
        root: the folder that the file names are relative to.
        class_names: in the order of the format.
        images: in the order of the output.
        losses: what could not be kept.
    """

    source: Path
    root: Path
    class_names: list[str]
    images: list[AnnotatedImage]
    losses: Losses


def add_instance(
    image: AnnotatedImage,
    class_name: str,
    segmentation: Segmentation,
    where: str,
    losses: Losses,
    *,
    crowd: bool = False,
) -> None:
    """Append an instance to `image`, or count it in `losses` if it has no area that can be annotated.

    Raises:
        InputError: its numbers are no segmentation of this image; the message starts with `where`.
    """
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) for polygon in segmentation):
            raise InputError(f"{where}: the segmentation must be a list of polygons or an RLE with size and counts")
        short = [polygon for polygon in segmentation if len(polygon) < 6]
        losses.add("polygons with fewer than three points, left out", where, len(short))
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not segmentation:
            return
    try:
        check_segmentation(segmentation, (image.height, image.width))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    image.instances.append(AnnotatedInstance(class_name, segmentation, crowd))


def compressed(segmentation: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """The mask of a segmentation of an image of `size` (h, w), as pycocotools draws it: RLE whose counts are bytes."""
    return segmentation_to_rle(segmentation, size)


def merged(parts: Sequence[Segmentation], size: tuple[int, int], where: str) -> Segmentation:
    """One segmentation of all parts of an instance in an image of `size` (h, w): polygons if all of them are.

    Raises:
        InputError: a part that has to be drawn is no segmentation of this image; the message starts with `where`.
    """
    if len(parts) == 1:
        return parts[0]
    polygons = [polygon for part in parts if isinstance(part, list) for polygon in part]
    if not any(isinstance(part, dict) for part in parts):
        return polygons
    try:
        for part in parts:
            check_segmentation(part, size)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    union = coco_mask.merge([compressed(part, size) for part in parts])
    return {"size": list(size), "counts": union["counts"].decode("ascii")}


def to_coco(reading: Reading, images: Sequence[AnnotatedImage] | None = None) -> dict[str, Any]:
    """COCO's JSON: ids from 1, areas and boxes of the masks, categories in the order of the format.

    Args:
        reading: what was read. Instances whose mask has no pixel are left out and counted in its `losses`.
        images: some of its images; None: all.

    Raises:
        InputError: an entry would not pass the checks of `solov2.data.annotations`.
    """
    numbers = {name: number for number, name in enumerate(reading.class_names, start=1)}
    content: dict[str, Any] = {
        "info": {"description": f"imported from {reading.source.name}"},
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }
    for image_id, image in enumerate(reading.images if images is None else images, start=1):
        size = (image.height, image.width)
        entry = {"id": image_id, "file_name": image.file_name, "height": image.height, "width": image.width}
        content["images"].append(entry)
        for number, instance in enumerate(image.instances, start=1):
            rle = compressed(instance.segmentation, size)
            area = int(coco_mask.area(rle))
            if area == 0:
                reading.losses.add("instances without a pixel, left out", f"{image.file_name}, instance {number}")
                continue
            annotation = {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": numbers[instance.class_name],
                "iscrowd": int(instance.is_crowd),
                "area": area,
                "bbox": coco_mask.toBbox(rle).tolist(),
                "segmentation": _for_json(instance.segmentation),
            }
            content["annotations"].append(annotation)
    for problem in find_problems(content):
        raise InputError(problem.sentence(reading.source))
    return content


def _for_json(segmentation: Segmentation) -> Segmentation:
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        return {"size": list(segmentation["size"]), "counts": segmentation["counts"].decode("ascii")}
    return segmentation


def used_classes(images: Iterable[AnnotatedImage]) -> list[str]:
    """The names of the classes that occur, sorted: for formats without a list of classes."""
    return sorted({instance.class_name for image in images for instance in image.instances})


def output_path(folder: Path, image: AnnotatedImage, suffix: str) -> Path:
    """The file for an image below a folder. Raises InputError if its name leads out of the folder."""
    if is_outside(image.file_name):
        raise InputError(f"the file name {image.file_name} is outside the folder of the images")
    return (folder / image.file_name).with_suffix(suffix)


def short_name(path: Path, root: Path) -> str:
    """A file relative to the folder, for messages."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
