"""What is wrong with, or worth knowing of, one image of a COCO data set and its annotations.

`solov2.data_check.check` runs this over a data set. The rules themselves are those of loading
(`solov2.data.annotations`, `solov2.ops`); what is added here are faults that loading does not notice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

from solov2.data.annotations import ImageRecord, reason_unusable, segmentation_fault, short_polygons
from solov2.data.transforms import resize_boxes
from solov2.errors import InputError
from solov2.ops.images import ImageHeader, read_header, read_image
from solov2.ops.masks import centers_of_mass, segmentation_to_rle, segmentations_to_masks
from solov2.ops.resize import padded_size, resize_masks, resized_size

# error: training would stop, or lose or change data without a word. warning: probably a mistake. note: worth knowing.
SEVERITIES = {
    **dict.fromkeys(
        # what stops loading: the kinds of solov2.data.annotations, and those of the image files
        ("no id", "id twice", "file name", "file outside", "size", "category name", "unknown image", "category id"),
        "error",
    ),
    **dict.fromkeys(("box", "area", "iscrowd", "segmentation"), "error"),
    **dict.fromkeys(("missing file", "unreadable file", "wrong size"), "error"),
    # what is lost or changed
    **dict.fromkeys(("unknown category", "categories off by one", "left out", "short polygon"), "error"),
    **dict.fromkeys(("empty mask", "no cell"), "error"),
    **dict.fromkeys(("file twice", "annotation twice", "near duplicate", "category name twice"), "warning"),
    **dict.fromkeys(("box differs", "area differs", "box beyond image"), "warning"),
    **dict.fromkeys(("unused category", "16 bit", "EXIF rotation", "no mask pixel"), "warning"),
    **dict.fromkeys(("crowd", "uncompressed RLE", "gray", "CMYK", "alpha", "small image", "no instance"), "note"),
}
# What solov2.data.repair takes away or puts right.
REPAIRABLE = {
    *("no id", "id twice", "file name", "file outside", "size", "category name", "unknown image", "category id"),
    *("box", "area", "iscrowd", "segmentation", "missing file", "unreadable file", "wrong size", "unknown category"),
    *("categories off by one", "left out", "short polygon", "empty mask", "file twice", "annotation twice"),
    *("box differs", "area differs", "box beyond image"),
}
NEAR_DUPLICATE = 0.95  # IoU above which two instances of a class are probably one
INSTANCES_AT_ONCE = 64  # whose masks are alive together
_GRAY, _ALPHA = ("1", "L", "LA", "La"), ("RGBA", "RGBa", "LA", "La", "PA")


class Finding(NamedTuple):
    """One fault or remark. Ids are None where it is not about one image or annotation; `file` is the image's name."""

    kind: str  # a key of SEVERITIES
    message: str
    image_id: int | None = None
    annotation_id: int | None = None
    file: str | None = None

    @property
    def severity(self) -> str:
        """error, warning or note."""
        return SEVERITIES[self.kind]

    def sentence(self) -> str:
        """The finding in words, with whom it is about in front."""
        parts = [
            None if self.file is None else f"{self.file}",
            None if self.image_id is None else f"image {self.image_id}",
            None if self.annotation_id is None else f"annotation {self.annotation_id}",
        ]
        where = ", ".join(part for part in parts if part)
        return f"{where}: {self.message}" if where else self.message


@dataclass(frozen=True)
class CheckSettings:
    """What an image is checked against.

    Attributes:
        root: folder of the images.
        labels: category id -> label.
        short_edges: short edges of training, the smallest and the largest.
        long_edge: limit of the long edge.
        min_size: images with a shorter edge are left out of training.
        assign: a `solov2.targets.TargetAssigner`.
    """

    root: Path
    labels: dict[int, int]
    short_edges: tuple[int, ...]
    long_edge: int
    min_size: int
    assign: Callable[[Sequence[dict[str, Tensor]], tuple[int, int]], dict[str, Any]]


class Instances(NamedTuple):
    """Usable instances of one image as training at the largest size sees them; one entry each.

    image_size int64 [N, 2] (h, w) of the file | ids, labels int64 [N] | scales float64 [N], sqrt(box area) in pixels of
    the resized image | centers float64 [N, 2], (y, x) of the center of mass as a share of the padded image
    cells int64 [N], positive cells of all levels | hidden bool [N], whether later instances claim all of them too
    """

    image_size: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    scales: np.ndarray
    centers: np.ndarray
    cells: np.ndarray
    hidden: np.ndarray


class ImageCheck(NamedTuple):
    """Findings, instances, and the number of cells that two instances or more claim."""

    findings: list[Finding]
    instances: Instances
    shared_cells: int


def check_image(record: ImageRecord, annotations: Sequence[dict[str, Any]], settings: CheckSettings) -> ImageCheck:
    """Everything about one image.

    Args:
        record: of an entry of `images` without a fault.
        annotations: its annotations without a fault of `annotation_fault`.
        settings: see there.
    """
    findings = list(file_findings(settings.root / record.file_name, record, settings.min_size))
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
    findings += duplicates([annotations[index] for index in rles], list(rles.values()), record)
    if not usable:
        findings.append(_finding("no instance", "has no usable instance: left out unless data.keep_empty", record))
    found, instances, shared = assign_instances(
        [annotations[index] for index in usable], [rles[index] for index in usable], record, settings
    )
    return ImageCheck(findings + found, instances, shared)


def file_findings(path: Path, record: ImageRecord, min_size: int) -> Iterator[Finding]:
    """Whether a file can be read, is of the stated size, and how its pixels become RGB."""
    try:
        exists = path.is_file()
    except OSError:  # a name that the file system does not take
        exists = False
    if not exists:
        yield _finding("missing file", f"{path} does not exist", record)
        return
    try:
        header = read_header(path)
        read_image(path, apply_exif=False)
    except InputError as error:
        yield _finding("unreadable file", str(error), record)
        return
    if (header.height, header.width) != (record.height, record.width):
        hint = "; EXIF rotation is not applied to data-set images" if header.turned else ""
        stated = f"the annotation file says {record.width} x {record.height}"
        yield _finding("wrong size", f"is {header.width} x {header.height}, but {stated}{hint}", record)
    if min(record.height, record.width) < min_size:
        yield _finding("small image", f"has an edge below data.min_image_size {min_size}: left out", record)
    for kind, message in pixel_remarks(header):
        yield _finding(kind, message, record)


def pixel_remarks(header: ImageHeader) -> Iterator[tuple[str, str]]:
    """(kind, message) of everything about a file that does not arrive in the network as it was stored."""
    if header.turned:
        yield "EXIF rotation", "has an EXIF rotation, which is not applied: annotations count on the stored pixels"
    if header.deep:
        yield "16 bit", "has 16 bits per channel, of which the upper eight are kept: rescale it first if it is dark"
    if header.mode == "CMYK":
        yield "CMYK", "is CMYK and is converted to RGB without a color profile"
    if header.mode in _GRAY:
        yield "gray", "is grayscale: the value is repeated in three channels"
    if header.mode in _ALPHA:
        yield "alpha", "has an alpha channel, which is dropped, not composited"


def check_annotation(annotation: dict[str, Any], record: ImageRecord) -> tuple[list[Finding], dict[str, Any] | None]:
    """Findings of one annotation, and its mask as compressed RLE where it has a pixel."""
    found = []

    def add(kind: str, message: str) -> None:
        found.append(_finding(kind, message, record, annotation["id"]))

    segmentation, size = annotation.get("segmentation"), (record.height, record.width)
    reason = reason_unusable(annotation, record)
    if annotation.get("iscrowd"):
        add("crowd", "is a crowd: not trained on, and ignored in evaluation")
    elif reason is not None:
        add("left out", f"has {reason} and is left out of training (bbox {annotation['bbox']})")
    fault = segmentation_fault(annotation, size)
    if fault is not None:
        add("segmentation", fault)
        return found, None
    if short_polygons(segmentation):
        add("short polygon", f"{short_polygons(segmentation)} polygon(s) of fewer than three points are not drawn")
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list) and not annotation.get("iscrowd"):
        add("uncompressed RLE", "has uncompressed run lengths, which load slower than compressed ones")
    rle = coco_mask.merge([segmentation_to_rle(annotation["segmentation"], size)])  # one spelling of the counts: bytes
    pixels = int(coco_mask.area(rle))
    if pixels == 0:
        add("empty mask", "has no pixel inside the image")
        return found, None
    tight = coco_mask.toBbox(rle).tolist()
    if box_leaves(annotation["bbox"], size):
        add("box beyond image", f"bbox {annotation['bbox']} leaves the {size[1]} x {size[0]} image and is clipped")
    elif box_differs(annotation["bbox"], tight):
        add("box differs", f"bbox {annotation['bbox']} is not the one of its mask, {tight}")
    if not annotation.get("iscrowd") and annotation["area"] > 0 and area_differs(annotation["area"], pixels, tight):
        add("area differs", f"area {annotation['area']:g} is not the one of its mask, {pixels}")
    return found, rle


def box_leaves(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether a box x, y, w, h leaves an image of `size` (h, w) by more than a pixel."""
    x, y, width, height = box
    return min(x, y) < -1 or x + width > size[1] + 1 or y + height > size[0] + 1


def box_differs(box: Sequence[float], tight: Sequence[float]) -> bool:
    """Whether a side of a box x, y, w, h lies off that of the mask's by more than 3 pixels and a tenth of the edge.

    Boxes of polygons are those of the points; rasterising moves them by up to a pixel or two.
    """
    (x, y, width, height), (tight_x, tight_y, tight_width, tight_height) = box, tight
    along_x = max(abs(x - tight_x), abs(x + width - tight_x - tight_width))
    along_y = max(abs(y - tight_y), abs(y + height - tight_y - tight_height))
    return along_x > max(3, 0.1 * tight_width) or along_y > max(3, 0.1 * tight_height)


def area_differs(area: float, pixels: int, tight: Sequence[float]) -> bool:
    """Whether a stated area is off the mask's pixels by a fifth and by more than half a pixel all along the box."""
    return abs(area - pixels) > max(0.2 * pixels, 0.5 * (tight[2] + tight[3]))


def duplicates(
    annotations: Sequence[dict[str, Any]], rles: Sequence[dict[str, Any]], record: ImageRecord
) -> Iterator[Finding]:
    """Instances of one class that are the same, or nearly; the later one is named. Crowds do not count."""
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
            kind, words = (
                ("annotation twice", "is") if same else ("near duplicate", f"has an IoU of {row[first]:.3f} with")
            )
            message = f"{words} annotation {annotations[indices[first]]['id']} of the same class" + (
                " again" if same else ""
            )
            yield _finding(kind, message, record, annotations[indices[second]]["id"])


def assign_instances(
    annotations: Sequence[dict[str, Any]], rles: Sequence[dict[str, Any]], record: ImageRecord, settings: CheckSettings
) -> tuple[list[Finding], Instances, int]:
    """Resize usable instances as training does, assign them to cells at every size, and describe the largest.

    Returns:
        findings about instances that no cell sees or whose mask has no pixel left, the instances, shared cells.
    """
    size, count = (record.height, record.width), len(annotations)
    corners = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    truth = {
        "boxes": torch.from_numpy(corners).float(),
        "labels": torch.tensor([settings.labels[annotation["category_id"]] for annotation in annotations]).long(),
    }
    seen, drawn = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    for short in settings.short_edges:
        new_size = resized_size(size, long=settings.long_edge, short=short)
        truth["scaled"] = resize_boxes(truth["boxes"], size, new_size)
        positives, centers, quarter = _assign(truth, rles, size, new_size, settings.assign)
        seen[positives[:, 1]] = True
        drawn |= quarter
    edges = truth["scaled"][:, 2:] - truth["scaled"][:, :2]
    scales = edges.double().prod(1).clamp(min=0).sqrt()
    cells, last = positives[:, 0], positives[:, 1]
    top = torch.full((int(cells.max()) + 1 if len(cells) else 0,), -1).scatter_reduce(0, cells, last, "amax")
    visible = torch.zeros(count, dtype=torch.bool).index_fill(0, top[top >= 0], True)
    instances = Instances(
        image_size=np.tile(np.array(size), (count, 1)),
        ids=np.array([annotation["id"] for annotation in annotations], dtype=object),
        labels=truth["labels"].numpy(),
        scales=scales.numpy(),
        centers=centers.numpy(),
        cells=torch.bincount(last, minlength=count).numpy(),
        hidden=(seen & ~visible).numpy(),
    )
    findings = []
    for index, annotation in enumerate(annotations):
        if not seen[index]:
            text = f"no cell sees it: sqrt(box area) is {scales[index]:.1f} px at {new_size[1]} x {new_size[0]}"
            findings.append(_finding("no cell", text, record, annotation["id"]))
        elif not drawn[index]:
            text = f"its mask has no pixel at a quarter of {new_size[1]} x {new_size[0]}, so an empty mask is learnt"
            findings.append(_finding("no mask pixel", text, record, annotation["id"]))
    return findings, instances, int((torch.bincount(cells) > 1).sum())


def _assign(
    truth: dict[str, Tensor],
    rles: Sequence[dict[str, Any]],
    size: tuple[int, int],
    new_size: tuple[int, int],
    assign: Callable[[Sequence[dict[str, Tensor]], tuple[int, int]], dict[str, Any]],
) -> tuple[Tensor, Tensor, Tensor]:
    """(cell, instance) int64 [P, 2], centers float64 [N, 2] as a share of the padded image, whether a mask is set."""
    padded = padded_size(new_size)
    extent = torch.tensor(padded, dtype=torch.float64)
    positives, centers, drawn = [torch.zeros(0, 2).long()], [torch.zeros(0, 2).double()], [torch.zeros(0).bool()]
    for start in range(0, len(rles), INSTANCES_AT_ONCE):
        part = slice(start, start + INSTANCES_AT_ONCE)
        masks = torch.cat([_resized_mask(rle, size, new_size) for rle in rles[part]])
        boxes = truth["scaled"][part]
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(1)  # dropped in training
        masks[flat] = 0
        targets = assign([{"boxes": boxes, "labels": truth["labels"][part], "masks": masks}], padded)
        positives.append(targets["positives"][:, 1:] + torch.tensor([0, start]))
        centers.append(torch.stack(centers_of_mass(masks)[:2], dim=1).double() / extent)
        drawn.append(targets["masks"].flatten(1).amax(1) > 0)
    return torch.cat(positives), torch.cat(centers), torch.cat(drawn)


def _resized_mask(rle: dict[str, Any], size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    masks, extents = segmentations_to_masks([rle], size)
    return resize_masks(masks, new_size, extents)


def _finding(kind: str, message: str, record: ImageRecord, annotation_id: int | None = None) -> Finding:
    return Finding(kind, message, record.image_id, annotation_id, record.file_name)
