"""Repair a COCO annotation file: what cannot be used is taken away, what follows from the mask is computed again.

Nothing is guessed: where a fault leaves two readings (two images of one id, a file of another size than stated), the
entries go, and the list of changes says so.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import pycocotools.mask as coco_mask

from solov2.data.annotations import (
    SECTIONS,
    ImageRecord,
    annotation_fault,
    category_fault,
    has_id,
    image_fault,
    is_integer,
    reason_unusable,
    segmentation_fault,
    shift_of_categories,
    short_polygons,
)
from solov2.data_check.findings import area_differs, box_differs, box_leaves
from solov2.ops.masks import segmentation_to_rle

Change = dict[str, Any]  # section, id, action, reason


def repair(content: Mapping[str, Any], unusable_images: Mapping[int, str]) -> tuple[dict[str, Any], list[Change]]:
    """A repaired copy of a parsed annotation file, and everything that was changed.

    Args:
        content: with the three lists; entries may be anything.
        unusable_images: id -> why the file cannot be used (missing, unreadable, of another size).

    Returns:
        (content that `CocoInstances` loads, changes: section, id, action "removed" or "changed", reason).
    """
    content = {**content, **{section: copy.deepcopy(content[section]) for section in SECTIONS}}
    changes: list[Change] = []

    def note(section: str, entry: Any, action: str, reason: str) -> None:
        number = entry["id"] if has_id(entry) else None
        changes.append({"section": section, "id": number, "action": action, "reason": reason})

    for section in SECTIONS:
        content[section] = _unique(content[section], section, note)
    content["images"] = _keep(content["images"], "images", _image_reason(unusable_images), note)
    for category in content["categories"]:
        if category_fault(category) is not None:
            category["name"] = f"category {category['id']}"
            note("categories", category, "changed", f"named '{category['name']}', it had no name")
    _merge_files(content, note)
    records = {
        image["id"]: ImageRecord(image["id"], image["file_name"], int(image["height"]), int(image["width"]))
        for image in content["images"]
    }
    _shift_categories(content, records, note)
    categories = {category["id"] for category in content["categories"]}
    content["annotations"] = _keep(
        content["annotations"],
        "annotations",
        lambda annotation: _repair_annotation(annotation, records, categories, note),
        note,
    )
    content["annotations"] = _without_twins(content["annotations"], records, note)
    return content, changes


def _keep(
    entries: list[dict], section: str, reason_to_remove: Callable[[dict], str | None], note: Callable[..., None]
) -> list[dict]:
    kept = []
    for entry in entries:
        reason = reason_to_remove(entry)
        if reason is None:
            kept.append(entry)
        else:
            note(section, entry, "removed", reason)
    return kept


def _unique(entries: list[Any], section: str, note: Callable[..., None]) -> list[dict]:
    """Entries with an id of their own. Annotations get a new one; images and categories are what others refer to."""
    groups: dict[int, list[dict]] = defaultdict(list)
    for entry in entries:
        if has_id(entry):
            groups[entry["id"]].append(entry)
    free, taken, kept = max([0, *groups]) + 1, set(), []
    for entry in entries:
        ambiguous = has_id(entry) and any(other != entry for other in groups[entry["id"]])
        again = has_id(entry) and entry["id"] in taken
        if not isinstance(entry, dict) or (not has_id(entry) and section != "annotations"):
            note(section, entry, "removed", f"has no integer id: {str(entry)[:80]}")
        elif again and not ambiguous:
            note(section, entry, "removed", "the same entry is there already")
        elif ambiguous and section != "annotations":
            note(section, entry, "removed", f"other {section} have this id, so it is not clear which one is meant")
        else:
            if again or not has_id(entry):
                old, entry["id"] = entry.get("id"), free
                free += 1
                note(section, entry, "changed", f"new id, it had {old!r}")
            taken.add(entry["id"])
            kept.append(entry)
    return kept


def _image_reason(unusable_images: Mapping[int, str]) -> Callable[[dict], str | None]:
    def reason(image: dict) -> str | None:
        fault = image_fault(image)
        return fault[1] if fault is not None else unusable_images.get(image["id"])

    return reason


def _merge_files(content: dict[str, Any], note: Callable[..., None]) -> None:
    """One entry per file: annotations of the others go to the first."""
    first: dict[str, int] = {}
    stands_for: dict[int, int] = {}
    kept = []
    for image in content["images"]:
        name = normal_name(image["file_name"])
        if name in first:
            stands_for[image["id"]] = first[name]
            note("images", image, "removed", f"the same file is image {first[name]}, which gets its annotations")
        else:
            first[name] = image["id"]
            kept.append(image)
    content["images"] = kept
    for annotation in content["annotations"]:
        image_id = annotation.get("image_id")
        if is_integer(image_id) and image_id in stands_for:
            annotation["image_id"] = stands_for[image_id]
            note("annotations", annotation, "changed", f"belongs to image {stands_for[image_id]} now, was {image_id}")


def normal_name(file_name: str) -> str:
    """A file name in one spelling: a/../b.jpg, ./b.jpg and b.jpg are one file."""
    return os.path.normpath(file_name)


def _shift_categories(content: dict[str, Any], records: Mapping[int, Any], note: Callable[..., None]) -> None:
    annotations = [annotation for annotation in content["annotations"] if is_integer(annotation.get("category_id"))]
    declared = [category["id"] for category in content["categories"]]
    shift = shift_of_categories((annotation["category_id"] for annotation in annotations), declared)
    for annotation in annotations if shift else []:
        annotation["category_id"] += shift
        note("annotations", annotation, "changed", f"category_id {annotation['category_id']}, all were off by one")


def _repair_annotation(
    annotation: dict, records: Mapping[int, ImageRecord], categories: set[int], note: Callable[..., None]
) -> str | None:
    """Put one annotation right in place; the reason where it has to go."""
    record = records.get(annotation["image_id"]) if is_integer(annotation.get("image_id")) else None
    if record is None:
        return f"belongs to image {annotation.get('image_id')}, which is not in `images` or was removed"
    if not is_integer(annotation.get("category_id")) or annotation["category_id"] not in categories:
        return f"category_id {annotation.get('category_id')!r} is not in `categories`"
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        annotation["iscrowd"] = 0 if crowd in (None, "", "0") else 1
        note("annotations", annotation, "changed", f"iscrowd {annotation['iscrowd']}, was {crowd!r}")
    size = (record.height, record.width)
    fault = segmentation_fault(annotation, size)
    if fault is not None:
        return fault
    if short_polygons(annotation["segmentation"]):
        annotation["segmentation"] = [polygon for polygon in annotation["segmentation"] if len(polygon) >= 6]
        note("annotations", annotation, "changed", "polygons of fewer than three points left out")
    rle = segmentation_to_rle(annotation["segmentation"], size)
    pixels, tight = int(coco_mask.area(rle)), [float(x) for x in coco_mask.toBbox(rle)]
    if pixels == 0:
        return "its mask has no pixel inside the image"
    broken = annotation_fault({**annotation, "area": 1}, {record.image_id}) is not None
    if not broken:
        reason = reason_unusable({**annotation, "iscrowd": 0, "area": 1}, record)
        broken = reason is not None or box_leaves(annotation["bbox"], size) or box_differs(annotation["bbox"], tight)
    if broken:
        note("annotations", annotation, "changed", f"bbox {tight} of its mask, was {annotation.get('bbox')!r}")
        annotation["bbox"] = tight
    crowd = annotation.get("iscrowd", 0)
    broken = annotation_fault(annotation, {record.image_id}) is not None or annotation["area"] <= 0
    if broken or (not crowd and area_differs(annotation["area"], pixels, tight)):
        note("annotations", annotation, "changed", f"area {pixels} of its mask, was {annotation.get('area')!r}")
        annotation["area"] = pixels
    return None


def _without_twins(
    annotations: list[dict], records: Mapping[int, ImageRecord], note: Callable[..., None]
) -> list[dict]:
    first: dict[tuple, int] = {}

    def reason(annotation: dict) -> str | None:
        if annotation.get("iscrowd"):
            return None
        record = records[annotation["image_id"]]
        rle = coco_mask.merge([segmentation_to_rle(annotation["segmentation"], (record.height, record.width))])
        key = (annotation["image_id"], annotation["category_id"], rle["counts"])
        if key in first:
            return f"the same as annotation {first[key]}"
        first[key] = annotation["id"]
        return None

    return _keep(annotations, "annotations", reason, note)
