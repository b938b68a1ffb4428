"""Check a panoptic dataset before training: the annotation file, every image and every PNG; repair areas and boxes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solov2.config import Config
from solov2.data.annotations import (
    SECTIONS,
    ImageId,
    ImageRecord,
    Problem,
    all_finite,
    has_id,
    require_folder,
)
from solov2.data.class_matching import distinct_names
from solov2.data.panoptic_annotations import Category, classes_fault, find_panoptic_problems, has_image_id
from solov2.data.panoptic_file import SWAPPED, looks_swapped, read_segment_map
from solov2.data_check.check import Report, category_findings, check_images, check_settings, duplicate_files
from solov2.data_check.findings import (
    CheckSettings,
    Finding,
    Instances,
    assign_instances,
    image_file_findings,
)
from solov2.data_check.normalize import Change
from solov2.data_check.statistics import summarize
from solov2.errors import InputError
from solov2.ops.masks import rle_from_columns
from solov2.ops.panoptic import measure_segments

MEASURABLE = ("box", "area", "iscrowd")  # faults of a segment whose id and category are known
SHOWN = 5  # ids in a message


class SegmentCheck(NamedTuple):
    """What the PNG says about a segment."""

    place: int  # in `segments_info`
    category_id: int
    area: int
    bbox: list[int]  # x, y, width, height


class PanopticImageCheck(NamedTuple):
    """Findings, instances as in `ImageCheck`, segments with pixels, and how many pixels are in no segment."""

    findings: list[Finding]
    instances: Instances
    shared_cells: int
    segments: list[SegmentCheck]
    void: int
    pixels: int


class Annotated(NamedTuple):
    """An entry of `annotations` that can be checked."""

    position: int  # in `annotations`
    entry: Mapping[str, Any]
    places: tuple[int, ...]  # of its segments with a valid id and a known category


def check_panoptic_data(
    content: Mapping[str, Any],
    images: Path,
    folder: Path,
    config: Config,
    *,
    workers: int = 0,
) -> Report:
    """Check panoptic annotations, image files and PNGs, and repair areas and boxes; every file is decoded once.

    Args:
        content: a parsed annotation file (`solov2.data.panoptic_annotations.load_panoptic_json`); its entries may be
            malformed.
        images: the folder that `file_name` of an image is relative to.
        folder: of the PNGs.
        config: its scale ranges, grids and sizes, and `data.crowd`, are what the instances are checked against.
        workers: number of checking processes; 0 and 1 check in this one.

    Raises:
        InputError: the image folder does not exist, or a checking process was killed.
    """
    require_folder(images)
    content, changes = clear_crowds(content) if config.data.crowd == "instance" else (content, [])
    problems = list(find_panoptic_problems(content, max_pixels=config.data.max_image_pixels))
    faulty = {(problem.section, problem.index) for problem in problems if problem.segment is None}
    usable = {s: [entry for i, entry in enumerate(content[s]) if (s, i) not in faulty] for s in SECTIONS}
    names = {image["id"]: image.get("file_name") for image in content["images"] if has_image_id(image)}
    records = {
        x["id"]: ImageRecord(x["id"], x["file_name"], int(x["height"]), int(x["width"])) for x in usable["images"]
    }
    categories = sorted(
        (Category(x["id"], x["name"], bool(x["isthing"])) for x in usable["categories"]), key=lambda x: x.id
    )
    annotated = _annotated(content["annotations"], problems, records, categories)
    findings = [_problem_finding(problem, content, names) for problem in problems]
    findings += _file_findings(usable, categories, annotated, names)
    things = [category for category in categories if category.is_thing]
    settings = check_settings(config, images, {category.id: label for label, category in enumerate(things)})
    image_ids = [x.entry["image_id"] for x in annotated]
    check = functools.partial(check_panoptic_image, settings=settings, folder=folder)
    checks = check_images(check, [records[image_id] for image_id in image_ids], annotated, workers)
    findings += [finding for check in checks for finding in check.findings]
    repaired, measured = repair_segments(content, annotated, checks)
    entries = repaired["annotations"]
    fixed = {(c["kind"], c["id"], entries[c["index"]]["segments_info"][c["segment"]]["id"]) for c in measured}
    findings = [
        x._replace(fix="repairs") if (x.kind.removesuffix(" differs"), x.image_id, x.segment_id) in fixed else x
        for x in findings
    ]
    statistics = summarize(checks, image_ids, [category.name for category in things], config)
    statistics["panoptic"] = panoptic_statistics(annotated, checks, categories)
    return Report(findings, statistics, repaired, changes + measured)


def clear_crowds(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[Change]]:
    """A copy of a panoptic annotation file without crowds, as training reads it where `data.crowd` is "instance".

    Its changes are as in `repair_segments`, with kind "crowd". Malformed entries stay as they are.
    """
    entries, changes = list(content["annotations"]), list[Change]()
    for index, entry in enumerate(entries):
        found = entry.get("segments_info") if isinstance(entry, dict) else None
        infos = found if isinstance(found, list) else []
        crowds = [place for place, info in enumerate(infos) if isinstance(info, dict) and info.get("iscrowd") == 1]
        if crowds:
            cleared = [{**info, "iscrowd": 0} if place in crowds else info for place, info in enumerate(infos)]
            entries[index] = {**entry, "segments_info": cleared}
        for place in crowds:
            reason = f"iscrowd 0 of segment {infos[place].get('id')}, was 1, because data.crowd is instance"
            changes.append(_change(index, entry.get("image_id"), place, "crowd", reason))
    return {**content, "annotations": entries}, changes


def _change(index: int, image_id: Any, place: int, kind: str, reason: str) -> Change:
    where = {"section": "annotations", "index": index, "id": image_id, "segment": place}
    return {**where, "kind": kind, "action": "changed", "reason": reason}


def _annotated(
    entries: Sequence[Any], problems: Sequence[Problem], image_ids: Collection[ImageId], categories: Sequence[Category]
) -> list[Annotated]:
    """The `annotations` that can be checked."""
    faulty = {problem.index for problem in problems if problem.section == "annotations" and problem.segment is None}
    broken = {(p.index, p.segment) for p in problems if p.segment is not None and p.kind not in MEASURABLE}
    known = {category.id for category in categories}
    annotated = []
    for i, entry in enumerate(entries):
        if i not in faulty and entry["image_id"] in image_ids:
            infos = enumerate(entry["segments_info"])
            places = tuple(place for place, x in infos if (i, place) not in broken and x["category_id"] in known)
            annotated.append(Annotated(i, entry, places))
    return annotated


def check_panoptic_image(
    record: ImageRecord, annotated: Annotated, settings: CheckSettings, folder: Path
) -> PanopticImageCheck:
    """Check one image, its PNG and its segments."""
    findings = list(image_file_findings(record, settings))
    size, entry = (record.height, record.width), annotated.entry
    listed = {segment["id"] for segment in entry["segments_info"] if has_id(segment)}
    try:
        ids = read_segment_map(folder / entry["file_name"], size, max_pixels=settings.max_pixels)
    except InputError as error:
        findings.append(_finding("unusable PNG", str(error), record))
        return PanopticImageCheck(findings, assign_instances([], [], record, settings)[1], 0, [], 0, 0)
    table = measure_segments(ids)
    measured = {number: (area, box) for number, area, box in zip(*(column.tolist() for column in table))}
    areas = {number: area for number, (area, _) in measured.items()}
    findings += _id_findings(listed, areas, record, folder / entry["file_name"])
    segments, instances, rles = [], [], []
    for place in annotated.places:
        info = entry["segments_info"][place]
        if info["id"] not in measured:
            findings.append(_finding("empty mask", "has no pixel in the PNG", record, info["id"]))
            continue
        area, (x1, y1, x2, y2) = measured[info["id"]]
        check = SegmentCheck(place, info["category_id"], area, [x1, y1, x2 - x1, y2 - y1])
        segments.append(check)
        findings += _segment_findings(info, check, record, is_thing=info["category_id"] in settings.labels)
        if _is_instance(info, settings.labels):
            window = ids[y1:y2, x1:x2].T == info["id"]
            rles.append(rle_from_columns(window, (y1, x1), size)[0])
            instances.append(info)
    void = ids.size - sum(area for number, area in areas.items() if number in listed)
    if entry["segments_info"] and void == ids.size:
        findings.append(_finding("all void", "has no pixel in any of its segments", record))
    elif 2 * void > ids.size:
        findings.append(_finding("mostly void", f"is void to {void / ids.size:.0%}", record))
    if not entry["segments_info"]:
        findings.append(_finding("no segment", "has no segment; left out of training unless data.keep_empty", record))
    found, table_of_instances, shared = assign_instances(instances, rles, record, settings)
    findings += [finding._replace(annotation_id=None, segment_id=finding.annotation_id) for finding in found]
    labels = [f"{record.image_id}/{info['id']}" for info in instances]  # ids of segments are unique in their image only
    table_of_instances = table_of_instances._replace(ids=np.array(labels, dtype=object))
    return PanopticImageCheck(findings, table_of_instances, shared, segments, void, ids.size)


def _id_findings(listed: set[int], areas: Mapping[int, int], record: ImageRecord, png: Path) -> Iterator[Finding]:
    """Findings of ids of the PNG that the JSON lacks."""
    unlisted = sorted(areas.keys() - listed)
    if looks_swapped(unlisted, listed):
        yield _finding("red and blue", f"{len(unlisted)} ids of {png} are not in the JSON: {SWAPPED}", record)
    elif unlisted:
        more = f" and {len(unlisted) - SHOWN} more" if len(unlisted) > SHOWN else ""
        pixels = sum(areas[number] for number in unlisted)
        text = f"ids of {png} are not in the JSON and count as void ({pixels} pixels): "
        yield _finding("unlisted id", text + ", ".join(map(str, unlisted[:SHOWN])) + more, record)


def _segment_findings(
    info: Mapping[str, Any], check: SegmentCheck, record: ImageRecord, *, is_thing: bool
) -> Iterator[Finding]:
    """Findings of one segment that has pixels, except of values that are no numbers, which stop loading."""
    if info.get("iscrowd", 0) == 1 and not is_thing:
        yield _finding("crowd of stuff", "is stuff with iscrowd 1, which is meant for things", record, info["id"])
    elif info.get("iscrowd", 0) == 1:
        yield _finding("crowd", "is a crowd, which training leaves out and evaluation ignores", record, info["id"])
    if _has_box(info) and info["bbox"] != check.bbox:
        text = f"bbox {info['bbox']} differs from that of its pixels, {check.bbox}"
        yield _finding("box differs", text, record, info["id"])
    if _has_area(info) and info["area"] != check.area:
        text = f"area {info['area']:g} differs from the number of its pixels, {check.area}"
        yield _finding("area differs", text, record, info["id"])
    if is_thing and info.get("iscrowd", 0) != 1 and _has_box(info) and _has_area(info) and not _is_big_enough(info):
        text = f"has an area or a box of 0 and is left out of training (area {info['area']}, bbox {info['bbox']})"
        yield _finding("left out", text, record, info["id"])


def _is_instance(info: Mapping[str, Any], labels: Mapping[int, int]) -> bool:
    thing = info["category_id"] in labels and info.get("iscrowd", 0) == 0
    return thing and _has_box(info) and _has_area(info) and _is_big_enough(info)


def _is_big_enough(info: Mapping[str, Any]) -> bool:
    return info["area"] > 0 and min(info["bbox"][2:]) >= 1


def _has_box(info: Mapping[str, Any]) -> bool:
    box = info.get("bbox")
    return isinstance(box, list) and len(box) == 4 and all_finite(box)


def _has_area(info: Mapping[str, Any]) -> bool:
    return all_finite([info.get("area")])


def repair_segments(
    content: Mapping[str, Any], annotated: Sequence[Annotated], checks: Sequence[PanopticImageCheck]
) -> tuple[dict[str, Any], list[Change]]:
    """A copy of a panoptic annotation file with the areas and boxes of the PNGs, and the list of changes.

    A change has section "annotations", index, id (of the image), segment (place in `segments_info`), kind "area" or
    "box", action "changed", and reason.
    """
    entries, changes = list(content["annotations"]), list[Change]()
    for (index, entry, _), check in zip(annotated, checks):
        infos = list(entry["segments_info"])
        for place, _, area, bbox in check.segments:
            for kind, key, value in (("area", "area", area), ("box", "bbox", bbox)):
                old = infos[place].get(key)
                if old == value and not isinstance(old, bool):
                    continue
                infos[place] = {**infos[place], key: value}
                reason = f"{key} {value} of the pixels of segment {infos[place]['id']}, was {old!r}"
                changes.append(_change(index, entry["image_id"], place, kind, reason))
                entries[index] = {**entry, "segments_info": infos}
    return {**content, "annotations": entries}, changes


def panoptic_statistics(
    annotated: Sequence[Annotated], checks: Sequence[PanopticImageCheck], categories: Sequence[Category]
) -> dict[str, Any]:
    """Void, crowds and classes, as plain JSON types. Shares are fractions of the pixels of all images."""
    total = max(1, sum(check.pixels for check in checks))
    is_thing = {category.id: category.is_thing for category in categories}
    segments, pixels, images = Counter[int](), Counter[int](), Counter[int]()
    without = Counter[bool]()
    for check in checks:
        for segment in check.segments:
            segments[segment.category_id] += 1
            pixels[segment.category_id] += segment.area
        present = {segment.category_id for segment in check.segments}
        images.update(present)
        without.update({True, False} - {is_thing[number] for number in present})
    classes: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for name, category in zip(distinct_names([category.name for category in categories]), categories):
        number = category.id
        classes[category.is_thing][name] = {
            "segments": segments[number],
            "images": images[number],
            "share": pixels[number] / total,
        }
    infos = (x.entry["segments_info"][place] for x in annotated for place in x.places)
    return {
        "void_share": sum(check.void for check in checks) / total,
        "mostly_void": sum(2 * check.void > check.pixels for check in checks),
        "crowds": sum(info.get("iscrowd", 0) == 1 for info in infos),
        "images_without_things": without[True],
        "images_without_stuff": without[False],
        "things": classes[True],
        "stuff": classes[False],
    }


def _problem_finding(problem: Problem, content: Mapping[str, Any], names: Mapping[ImageId, Any]) -> Finding:
    """The finding of what would stop loading."""
    entry = content[problem.section][problem.index]
    key = {"images": "id", "annotations": "image_id"}.get(problem.section, "")
    image_id = entry[key] if key and has_image_id(entry, key) else None
    name = names.get(image_id) if image_id is not None else None
    info = entry["segments_info"][problem.segment] if problem.segment is not None else None
    message = f"{problem.where} {problem.message}" if problem.section == "categories" else problem.message
    return Finding(
        problem.kind,
        message.strip(),
        image_id,
        file=name if isinstance(name, str) else None,
        place=(problem.section, problem.index),
        segment_id=info["id"] if info is not None and has_id(info) else None,
    )


def _file_findings(
    usable: Mapping[str, list[dict]],
    categories: Sequence[Category],
    annotated: Sequence[Annotated],
    names: Mapping[Any, Any],
) -> Iterator[Finding]:
    """Findings of the entries that loading accepts, taken together."""
    fault = classes_fault(categories)
    if fault is not None:
        yield Finding("classes", fault)
    yield from duplicate_files(usable["images"])
    first, present, infos = dict[str, ImageId](), set[ImageId](), list[dict]()
    for _, entry, places in annotated:
        image_id, png = entry["image_id"], entry["file_name"]
        present.add(image_id)
        if first.setdefault(png, image_id) != image_id:
            yield Finding("file twice", f"has the PNG {png} of image {first[png]}", image_id, file=names[image_id])
        infos += [{**entry["segments_info"][place], "image_id": image_id} for place in places]
    for image in usable["images"]:
        if image["id"] not in present:
            yield Finding("no annotation", "has no annotation and is left out", image["id"], file=image["file_name"])
    yield from category_findings(infos, usable["categories"], names)


def _finding(kind: str, message: str, record: ImageRecord, segment_id: int | None = None) -> Finding:
    return Finding(kind, message, record.image_id, file=record.file_name, segment_id=segment_id)
