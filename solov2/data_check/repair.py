"""Repair a COCO annotation file: rewrite what the data determines, remove what cannot be used.

`solov2.data_check.normalize` reads other notations; this module does what needs the masks or several entries at
once. Nothing is guessed: where a fault is ambiguous (two images with one id, a file of another size than stated), the
entries are removed. All changes are listed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pycocotools.mask as coco_mask

from solov2.data.annotations import (
    SECTIONS,
    ImageId,
    ImageRecord,
    annotation_fault,
    category_fault,
    category_id_shift,
    count_short_polygons,
    has_id,
    image_fault,
    is_integer,
    reason_unusable,
    segmentation_fault,
)
from solov2.data_check.findings import area_differs, box_differs, box_exceeds
from solov2.data_check.normalize import Change, normalize
from solov2.ops.images import MAX_PIXELS
from solov2.ops.masks import segmentation_to_rle


def repair(
    content: Mapping[str, Any],
    images: Path,
    unusable_images: Mapping[ImageId, str],
    *,
    crowd: str = "ignore",
    max_pixels: int = MAX_PIXELS,
) -> tuple[dict[str, Any], list[Change]]:
    """A repaired copy of a parsed annotation file, and the list of changes.

    Args:
        content: has the three lists; their entries may be malformed.
        images: the folder that `file_name` is relative to.
        unusable_images: image id (as `normalize` has it) -> why its file cannot be used (missing, unreadable, of
            another size).
        crowd: the setting `data.crowd`; "instance" sets every `iscrowd` to 0.
        max_pixels: maximum width x height of an image.

    Returns:
        (content that `CocoInstances` loads, changes: section, index of the entry in `content`, id, action "removed" or
        "changed", reason).
    """
    content, changes = normalize(content, images, crowd=crowd, max_pixels=max_pixels)
    places = {id(entry): index for section in SECTIONS for index, entry in enumerate(content[section])}

    def report(section: str, entry: Any, action: str, reason: str, index: int | None = None) -> None:
        number, index = entry["id"] if has_id(entry) else None, places[id(entry)] if index is None else index
        changes.append({"section": section, "index": index, "id": number, "action": action, "reason": reason})

    for section in SECTIONS:
        content[section] = _with_unique_ids(content[section], section, report)
    content["images"] = _filter(
        content["images"], "images", lambda image: _image_removal_reason(image, unusable_images, max_pixels), report
    )
    for category in content["categories"]:
        if category_fault(category) is not None:
            category["name"] = f"category {category['id']}"
            report("categories", category, "changed", f"name '{category['name']}', had none")
    _merge_duplicate_files(content, report)
    records = {
        image["id"]: ImageRecord(image["id"], image["file_name"], int(image["height"]), int(image["width"]))
        for image in content["images"]
    }
    _shift_categories(content, report)
    categories = {category["id"] for category in content["categories"]}
    first: dict[tuple, int] = {}
    content["annotations"] = _filter(
        content["annotations"],
        "annotations",
        lambda annotation: _repair_annotation(annotation, records, categories, first, report),
        report,
    )
    return content, changes


def _filter(
    entries: list[dict], section: str, reason_to_remove: Callable[[dict], str | None], report: Callable[..., None]
) -> list[dict]:
    kept = []
    for entry in entries:
        reason = reason_to_remove(entry)
        if reason is None:
            kept.append(entry)
        else:
            report(section, entry, "removed", reason)
    return kept


def _with_unique_ids(entries: list[Any], section: str, report: Callable[..., None]) -> list[dict]:
    """Entries with unique ids. Only annotations can get a new id, because others refer to images and categories."""
    groups: dict[int, list[dict]] = defaultdict(list)
    for entry in entries:
        if has_id(entry):
            groups[entry["id"]].append(entry)
    free, taken, kept = max([0, *groups]) + 1, set(), []
    differing = {number for number, group in groups.items() if any(entry != group[0] for entry in group)}
    for index, entry in enumerate(entries):
        ambiguous = has_id(entry) and entry["id"] in differing
        repeated = has_id(entry) and entry["id"] in taken
        if not isinstance(entry, dict) or (not has_id(entry) and section != "annotations"):
            report(section, entry, "removed", f"has no integer id: {str(entry)[:80]}", index)
        elif repeated and not ambiguous:
            report(section, entry, "removed", "repeats an identical entry")
        elif ambiguous and section != "annotations":
            report(section, entry, "removed", f"other {section} have the same id, so references are ambiguous")
        else:
            # Only pycocotools objects to an annotation's id 0: it takes it for "no match".
            if repeated or not has_id(entry) or (section == "annotations" and entry["id"] == 0):
                old, entry["id"] = entry.get("id"), free
                free += 1
                report(section, entry, "changed", f"new id, was {old!r}")
            taken.add(entry["id"])
            kept.append(entry)
    return kept


def _image_removal_reason(image: dict, unusable_images: Mapping[ImageId, str], max_pixels: int) -> str | None:
    fault = image_fault(image, max_pixels)
    return fault[1] if fault is not None else unusable_images.get(image["id"])


def _merge_duplicate_files(content: dict[str, Any], report: Callable[..., None]) -> None:
    """Keep one entry per file; the annotations of the others go to the first."""
    first: dict[str, int] = {}
    replacement: dict[int, int] = {}
    kept = []
    for image in content["images"]:
        name = normalize_file_name(image["file_name"])
        if name in first:
            replacement[image["id"]] = first[name]
            report("images", image, "removed", f"same file as image {first[name]}, which gets its annotations")
        else:
            first[name] = image["id"]
            kept.append(image)
    content["images"] = kept
    for annotation in content["annotations"]:
        image_id = annotation.get("image_id")
        if is_integer(image_id) and image_id in replacement:
            annotation["image_id"] = replacement[image_id]
            report("annotations", annotation, "changed", f"image_id {replacement[image_id]}, was {image_id}")


def normalize_file_name(file_name: str) -> str:
    """The normalized file name: a/../b.jpg, ./b.jpg and b.jpg are the same file."""
    return os.path.normpath(file_name)


def _shift_categories(content: dict[str, Any], report: Callable[..., None]) -> None:
    annotations = [annotation for annotation in content["annotations"] if is_integer(annotation.get("category_id"))]
    declared = [category["id"] for category in content["categories"]]
    shift = category_id_shift((annotation["category_id"] for annotation in annotations), declared)
    for annotation in annotations if shift else []:
        annotation["category_id"] += shift
        report("annotations", annotation, "changed", f"category_id {annotation['category_id']}; all were off by one")


def _repair_annotation(
    annotation: dict,
    records: Mapping[int, ImageRecord],
    categories: set[int],
    first: dict[tuple, int],
    report: Callable[..., None],
) -> str | None:
    """Repair one annotation in place; returns the reason if it must be removed instead.

    `first` collects (image, class, mask) -> annotation id of those that are kept.
    """
    record = records.get(annotation["image_id"]) if is_integer(annotation.get("image_id")) else None
    if record is None:
        return f"belongs to image {annotation.get('image_id')}, which is not in `images` or was removed"
    if not is_integer(annotation.get("category_id")) or annotation["category_id"] not in categories:
        return f"category_id {annotation.get('category_id')!r} is not in `categories`"
    size = (record.height, record.width)
    fault = segmentation_fault(annotation, size)
    if fault is not None:
        return fault
    if count_short_polygons(annotation["segmentation"]):
        annotation["segmentation"] = [polygon for polygon in annotation["segmentation"] if len(polygon) >= 6]
        report("annotations", annotation, "changed", "removed polygons with fewer than three points")
    rle = segmentation_to_rle(annotation["segmentation"], size)
    pixels, tight = int(coco_mask.area(rle)), [float(x) for x in coco_mask.toBbox(rle)]
    if pixels == 0:
        return "has no mask pixel inside the image"
    crowd = annotation.get("iscrowd", 0)
    number = (
        annotation["id"]
        if crowd
        else first.setdefault((annotation["image_id"], annotation["category_id"], rle["counts"]), annotation["id"])
    )
    if number != annotation["id"]:
        return f"has the same mask and class as annotation {number}"
    broken = annotation_fault({**annotation, "area": 1}, {record.image_id}) is not None
    if not broken:
        reason = reason_unusable({**annotation, "iscrowd": 0, "area": 1}, record)
        broken = reason is not None or box_exceeds(annotation["bbox"], size) or box_differs(annotation["bbox"], tight)
    if broken:
        report("annotations", annotation, "changed", f"bbox {tight} from the mask, was {annotation.get('bbox')!r}")
        annotation["bbox"] = tight
    broken = annotation_fault(annotation, {record.image_id}) is not None or annotation["area"] <= 0
    if broken or (not crowd and area_differs(annotation["area"], pixels, tight)):
        report("annotations", annotation, "changed", f"area {pixels} from the mask, was {annotation.get('area')!r}")
        annotation["area"] = pixels
    return None
