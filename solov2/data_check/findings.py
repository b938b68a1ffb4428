"""What is wrong with, or worth knowing about, one image of a COCO dataset and its annotations.

`solov2.data_check.check` runs this over a dataset. It applies the rules of loading (`solov2.data.annotations`,
`solov2.ops`) and adds faults that loading does not notice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

from solov2.data.annotations import (
    ImageId,
    ImageRecord,
    count_short_polygons,
    is_file,
    reason_unusable,
    segmentation_fault,
)
from solov2.data.transforms import resize_boxes
from solov2.errors import InputError
from solov2.ops.encoded_masks import EncodedMasks
from solov2.ops.images import ImageHeader, read_header, read_image
from solov2.ops.masks import centers_of_mass, segmentation_to_rle
from solov2.ops.resize import padded_size, resized_size

# error: training would stop, or silently lose or change data. warning: probably a mistake. note: worth knowing.
SEVERITIES = {
    **dict.fromkeys(
        # stop loading: the kinds of solov2.data.annotations, and those of the image files
        ("no id", "id twice", "file name", "file outside", "size", "category name", "unknown image", "category id"),
        "error",
    ),
    **dict.fromkeys(("box", "area", "iscrowd", "segmentation"), "error"),
    **dict.fromkeys(("missing file", "unreadable file", "wrong size"), "error"),
    # silently lose or change data
    **dict.fromkeys(("unknown category", "categories off by one", "left out", "short polygon"), "error"),
    **dict.fromkeys(("empty mask", "no cell", "no masks"), "error"),
    **dict.fromkeys(("many crowds", "boxes as corners", "id 0"), "warning"),
    **dict.fromkeys(("file twice", "annotation twice", "near duplicate", "category name twice"), "warning"),
    **dict.fromkeys(("box differs", "area differs", "box beyond image"), "warning"),
    **dict.fromkeys(("unused category", "16 bit", "animation", "EXIF rotation", "no mask pixel"), "warning"),
    **dict.fromkeys(("crowd", "uncompressed RLE", "gray", "CMYK", "alpha", "small image", "no instance"), "note"),
}
PANOPTIC_SEVERITIES = {  # of panoptic files alone, beside those above
    **dict.fromkeys(("mixed ids", "isthing", "classes", "image twice", "no segments", "segment id"), "error"),
    **dict.fromkeys(("segment id twice", "unusable PNG", "red and blue", "unlisted id"), "error"),
    **dict.fromkeys(("crowd of stuff", "all void"), "warning"),
    **dict.fromkeys(("no annotation", "no segment", "mostly void"), "note"),
}
# What solov2.data_check.repair corrects or, where the data does not determine the right value, removes.
REPAIRABLE = {
    *("no id", "id twice", "file name", "file outside", "size", "category name", "unknown image", "category id"),
    *("box", "area", "iscrowd", "segmentation", "missing file", "unreadable file", "wrong size", "unknown category"),
    *("categories off by one", "left out", "short polygon", "empty mask", "file twice", "annotation twice"),
    *("box differs", "area differs", "box beyond image", "boxes as corners", "id 0"),
}
NEAR_DUPLICATE = 0.95  # IoU above which two instances of a class are probably the same object
INSTANCES_AT_ONCE = 64  # whose masks are in memory together
_GRAY, _ALPHA = ("1", "L", "LA", "La"), ("RGBA", "RGBa", "LA", "La", "PA")


class Finding(NamedTuple):
    """One fault or remark. Ids are None if it is not about one image or annotation.

    `file` is the image's file name; `place`, where the ids do not say it, the entry's section and index; `fix` what
    --fix does about it: "repairs", "removes" the entry, or None; `segment_id` is for panoptic files.
    """

    kind: str  # a key of SEVERITIES or PANOPTIC_SEVERITIES
    message: str
    image_id: ImageId | None = None
    annotation_id: int | None = None
    file: str | None = None
    place: tuple[str, int] | None = None
    fix: str | None = None
    segment_id: int | None = None

    @property
    def severity(self) -> str:
        """One of error, warning and note."""
        return (SEVERITIES | PANOPTIC_SEVERITIES)[self.kind]

    def sentence(self) -> str:
        """The message, with the file and the ids it is about in front."""
        parts = [
            self.file,
            None if self.image_id is None else f"image {self.image_id}",
            None if self.annotation_id is None else f"annotation {self.annotation_id}",
            None if self.segment_id is None else f"segment {self.segment_id}",
        ]
        where = ", ".join(part for part in parts if part)
        return f"{where}: {self.message}" if where else self.message


@dataclass(frozen=True)
class CheckSettings:
    """What an image is checked against.

    Attributes:
        root: folder of the images.
        labels: category id -> label.
        short_edges: smallest and largest short edge in training, in pixels.
        long_edge: limit of the long edge in training, in pixels.
        min_size: training leaves out images with an edge below this, in pixels.
        max_pixels: maximum width x height of an image.
        assign: a `solov2.targets.TargetAssigner`.
    """

    root: Path
    labels: dict[int, int]
    short_edges: tuple[int, ...]
    long_edge: int
    min_size: int
    max_pixels: int
    assign: Callable[[Sequence[dict[str, Tensor]], tuple[int, int]], dict[str, Any]]


class Instances(NamedTuple):
    """The usable instances of one image as training sees them at its largest size.

    image_size int64 [N, 2] (h, w) of the file | ids object [N] of int | labels int64 [N]
    scales float64 [N], sqrt(box area) in pixels of the resized image
    centers float64 [N, 2], (y, x) of the center of mass as a fraction of the padded image
    cells int64 [N], number of positive cells on all levels | hidden bool [N], whether later instances claim all of them
    """

    image_size: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    scales: np.ndarray
    centers: np.ndarray
    cells: np.ndarray
    hidden: np.ndarray


class ImageCheck(NamedTuple):
    """Findings, instances, and the number of cells claimed by two or more instances."""

    findings: list[Finding]
    instances: Instances
    shared_cells: int


class ChecksOfImage(Protocol):
    """What statistics need of `ImageCheck` and of its counterpart for panoptic files."""

    @property
    def instances(self) -> Instances:
        """The usable instances."""

    @property
    def shared_cells(self) -> int:
        """The number of cells claimed by two or more instances."""


def check_image(record: ImageRecord, annotations: Sequence[dict[str, Any]], settings: CheckSettings) -> ImageCheck:
    """Check one image and its annotations.

    Args:
        record: of an entry of `images` in which `image_fault` finds nothing.
        annotations: those of the image in which `annotation_fault` finds nothing.
        settings: what to check against.
    """
    findings = list(image_file_findings(record, settings))
    rles: dict[int, dict[str, Any]] = {}  # index into annotations -> mask
    usable = []
    for index, annotation in enumerate(annotations):
        found, rle = check_annotation(annotation, record)
        findings += found
        if rle is not None:
            rles[index] = rle
            known = annotation["category_id"] in settings.labels
            if known and reason_unusable(annotation, record) is None:
                usable.append(index)
    findings += find_duplicates([annotations[index] for index in rles], list(rles.values()), record)
    if not usable:
        findings.append(_finding("no instance", "has no usable instance; left out unless data.keep_empty", record))
    found, instances, shared = assign_instances(
        [annotations[index] for index in usable], [rles[index] for index in usable], record, settings
    )
    return ImageCheck(findings + found, instances, shared)


def image_file_findings(record: ImageRecord, settings: CheckSettings) -> Iterator[Finding]:
    """Whether the file can be read and has the stated size, and what is lost when its pixels become RGB."""
    path, min_size, limit = settings.root / record.file_name, settings.min_size, settings.max_pixels
    if not is_file(path):
        yield _finding("missing file", f"{path} does not exist", record)
        return
    try:
        header = read_header(path, max_pixels=limit)
        read_image(path, apply_exif=False, max_pixels=limit)
    except InputError as error:
        yield _finding("unreadable file", str(error), record)
        return
    if (header.height, header.width) != (record.height, record.width):
        hint = "; EXIF rotation is not applied to dataset images" if header.turned else ""
        stated = f"the annotation file says {record.width} x {record.height}"
        yield _finding("wrong size", f"is {header.width} x {header.height}, but {stated}{hint}", record)
    if min(record.height, record.width) < min_size:
        yield _finding("small image", f"has an edge below data.min_image_size {min_size}; left out", record)
    for kind, message in pixel_findings(header):
        yield _finding(kind, message, record)


def pixel_findings(header: ImageHeader) -> Iterator[tuple[str, str]]:
    """(kind, message) for everything stored in the file that does not reach the network unchanged."""
    if header.turned:
        yield "EXIF rotation", "has an EXIF rotation, which is not applied: annotations refer to the stored pixels"
    if header.deep:
        yield "16 bit", "has 16 bits per channel, of which only the upper eight are kept; rescale it if it is dark"
    if header.animated:
        yield "animation", "is an animation, of which only the first frame is used"
    if header.mode == "CMYK":
        yield "CMYK", "is CMYK and is converted to RGB without a color profile"
    if header.mode in _GRAY:
        yield "gray", "is grayscale; the value is repeated in all three channels"
    if header.mode in _ALPHA:
        yield "alpha", "has an alpha channel, which is dropped without compositing"


def check_annotation(annotation: dict[str, Any], record: ImageRecord) -> tuple[list[Finding], dict[str, Any] | None]:
    """Findings of one annotation, and its mask as compressed RLE (None if it is invalid or empty)."""
    found = []

    def add(kind: str, message: str) -> None:
        found.append(_finding(kind, message, record, annotation["id"]))

    segmentation, size = annotation.get("segmentation"), (record.height, record.width)
    reason = reason_unusable(annotation, record)
    if annotation.get("iscrowd"):
        add("crowd", "is a crowd, which training leaves out and evaluation ignores")
    elif reason is not None:
        add("left out", f"has {reason} and is left out of training (bbox {annotation['bbox']})")
    fault = segmentation_fault(annotation, size)
    if fault is not None:
        add("segmentation", fault)
        return found, None
    if count_short_polygons(segmentation):
        add("short polygon", f"ignored polygons with fewer than three points: {count_short_polygons(segmentation)}")
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list) and not annotation.get("iscrowd"):
        add("uncompressed RLE", "is an uncompressed RLE, which loads more slowly than a compressed one")
    rle = segmentation_to_rle(annotation["segmentation"], size)
    pixels = int(coco_mask.area(rle))
    if pixels == 0:
        add("empty mask", "has no mask pixel inside the image")
        return found, None
    tight = coco_mask.toBbox(rle).tolist()
    if box_exceeds(annotation["bbox"], size):
        add("box beyond image", f"bbox {annotation['bbox']} exceeds the {size[1]} x {size[0]} image and is clipped")
    elif box_differs(annotation["bbox"], tight):
        add("box differs", f"bbox {annotation['bbox']} differs from that of its mask, {tight}")
    if not annotation.get("iscrowd") and annotation["area"] > 0 and area_differs(annotation["area"], pixels, tight):
        add("area differs", f"area {annotation['area']:g} differs from that of its mask, {pixels}")
    return found, rle


def box_exceeds(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether a box (x, y, w, h) extends more than a pixel beyond an image of `size` (h, w)."""
    x, y, width, height = box
    return min(x, y) < -1 or x + width > size[1] + 1 or y + height > size[0] + 1


def box_differs(box: Sequence[float], tight: Sequence[float]) -> bool:
    """Whether a side of a box (x, y, w, h) is off the mask's tight box by more than 3 pixels and a tenth of its edge.

    The box of a polygon is that of its points; rasterizing moves it by up to a pixel or two.
    """
    (x, y, width, height), (tight_x, tight_y, tight_width, tight_height) = box, tight
    along_x = max(abs(x - tight_x), abs(x + width - tight_x - tight_width))
    along_y = max(abs(y - tight_y), abs(y + height - tight_y - tight_height))
    return along_x > max(3, 0.1 * tight_width) or along_y > max(3, 0.1 * tight_height)


def area_differs(area: float, pixels: int, tight: Sequence[float]) -> bool:
    """Whether a stated area is off the mask's pixels by more than a fifth and more than half of the box's w + h."""
    return abs(area - pixels) > max(0.2 * pixels, 0.5 * (tight[2] + tight[3]))


def find_duplicates(
    annotations: Sequence[dict[str, Any]], rles: Sequence[dict[str, Any]], record: ImageRecord
) -> Iterator[Finding]:
    """Instances of one class with (nearly) the same mask; the later one gets the finding. Crowds do not count."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, annotation in enumerate(annotations):
        if not annotation.get("iscrowd"):
            groups[annotation["category_id"]].append(index)
    for indices in groups.values():
        masks = [rles[index] for index in indices]
        for second, row in enumerate(coco_mask.iou(masks, masks, [0] * len(masks)) if len(masks) > 1 else []):
            first = int(row[:second].argmax()) if second else 0
            if not second or row[first] <= NEAR_DUPLICATE:
                continue
            same = masks[first]["counts"] == masks[second]["counts"]
            overlap = "the same mask as" if same else f"an IoU of {row[first]:.3f} with"
            kind = "annotation twice" if same else "near duplicate"
            message = f"has {overlap} annotation {annotations[indices[first]]['id']} of the same class"
            yield _finding(kind, message, record, annotations[indices[second]]["id"])


def assign_instances(
    annotations: Sequence[dict[str, Any]], rles: Sequence[dict[str, Any]], record: ImageRecord, settings: CheckSettings
) -> tuple[list[Finding], Instances, int]:
    """Resize usable instances and assign them to cells as training does, at each of `settings.short_edges`.

    Returns:
        findings of instances that get no cell or whose mask has no pixel left at any size; instances and number of
        shared cells at the largest size.
    """
    size, count = (record.height, record.width), len(annotations)
    corners = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    truth = {
        "boxes": torch.from_numpy(corners).float(),
        "labels": torch.tensor([settings.labels[annotation["category_id"]] for annotation in annotations]).long(),
    }
    assigned, nonempty = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    for short in settings.short_edges:
        new_size = resized_size(size, long=settings.long_edge, short=short)
        truth["scaled"] = resize_boxes(truth["boxes"], size, new_size)
        positives, centers, nonempty_here = _assign(truth, rles, size, new_size, settings.assign)
        assigned[positives[:, 1]] = True
        nonempty |= nonempty_here
    edges = truth["scaled"][:, 2:] - truth["scaled"][:, :2]
    scales = edges.double().prod(1).clamp(min=0).sqrt()
    cells, owners = positives[:, 0], positives[:, 1]
    latest = torch.full((int(cells.max()) + 1 if len(cells) else 0,), -1).scatter_reduce(0, cells, owners, "amax")
    visible = torch.zeros(count, dtype=torch.bool).index_fill(0, latest[latest >= 0], True)
    instances = Instances(
        image_size=np.tile(np.array(size), (count, 1)),
        ids=np.array([annotation["id"] for annotation in annotations], dtype=object),
        labels=truth["labels"].numpy(),
        scales=scales.numpy(),
        centers=centers.numpy(),
        cells=torch.bincount(owners, minlength=count).numpy(),
        hidden=(assigned & ~visible).numpy(),
    )
    findings = []
    for index, annotation in enumerate(annotations):
        if not assigned[index]:
            text = f"gets no grid cell: sqrt(box area) is {scales[index]:.1f} px at {new_size[1]} x {new_size[0]}"
            findings.append(_finding("no cell", text, record, annotation["id"]))
        elif not nonempty[index]:
            text = f"has no mask pixel at 1/4 of {new_size[1]} x {new_size[0]}, so an empty mask is learned"
            findings.append(_finding("no mask pixel", text, record, annotation["id"]))
    return findings, instances, int((torch.bincount(cells) > 1).sum())


def _assign(
    truth: dict[str, Tensor],
    rles: Sequence[dict[str, Any]],
    size: tuple[int, int],
    new_size: tuple[int, int],
    assign: Callable[[Sequence[dict[str, Tensor]], tuple[int, int]], dict[str, Any]],
) -> tuple[Tensor, Tensor, Tensor]:
    """(cell, instance) int64 [P, 2]; centers float64 [N, 2], fractions of the padded image; nonempty masks bool [N]."""
    padded = padded_size(new_size)
    extent = torch.tensor(padded, dtype=torch.float64)
    positives, centers, nonempty = [torch.zeros(0, 2).long()], [torch.zeros(0, 2).double()], [torch.zeros(0).bool()]
    for start in range(0, len(rles), INSTANCES_AT_ONCE):
        part = slice(start, start + INSTANCES_AT_ONCE)
        encoded = EncodedMasks.from_segmentations(rles[part], size).resize(new_size)
        masks = torch.cat([planes for planes, _ in encoded.chunks()])
        boxes = truth["scaled"][part]
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(1)  # dropped in training
        masks[flat] = 0
        targets = assign([{"boxes": boxes, "labels": truth["labels"][part], "masks": masks}], padded)
        positives.append(targets["positives"][:, 1:] + torch.tensor([0, start]))
        centers.append(torch.stack(centers_of_mass(masks)[:2], dim=1).double() / extent)
        nonempty.append(targets["masks"].flatten(1).amax(1) > 0)
    return torch.cat(positives), torch.cat(centers), torch.cat(nonempty)


def _finding(kind: str, message: str, record: ImageRecord, annotation_id: int | None = None) -> Finding:
    return Finding(kind, message, record.image_id, annotation_id, record.file_name)
