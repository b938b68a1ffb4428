"""Check a COCO dataset before training: the annotation file and every image."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from solov2.build import build_assigner
from solov2.config import Config
from solov2.data.annotations import (
    MAX_CROWD_SHARE,
    NO_MASKS,
    SECTIONS,
    ImageId,
    ImageRecord,
    category_id_shift,
    count_crowds,
    crowd_message,
    find_problems,
    has_id,
    lacks_masks,
    require_folder,
)
from solov2.data_check.findings import REPAIRABLE, CheckSettings, Finding, check_image
from solov2.data_check.normalize import Change, normalize
from solov2.data_check.quick import CORNERS, off_by_one_message
from solov2.data_check.repair import normalize_file_name, repair
from solov2.data_check.statistics import boxes_look_like_corners, summarize
from solov2.errors import InputError

Checked = TypeVar("Checked")
CHUNK = 8  # images that a checking process takes at a time
UNUSABLE_FILES = ("missing file", "unreadable file", "wrong size")
NOTATION = ("missing file", "segmentation")  # kinds of `normalize` that `find_problems` does not report


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        findings: first those of the annotation file, then image by image.
        statistics: of `summarize`.
        repaired, changes: what `repair` makes of the annotations; without changes, they are as they were.
    """

    findings: list[Finding]
    statistics: dict[str, Any]
    repaired: Mapping[str, Any]
    changes: list[Change]

    def counts(self) -> dict[str, int]:
        """Number of findings of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in ("error", "warning", "note")}


def check_data(content: Mapping[str, Any], images: str | Path, config: Config, *, workers: int = 0) -> Report:
    """Check annotations and image files, and repair the annotations; every file is decoded once.

    What is written in another notation (`normalize`) is reported, and then checked as if it were repaired.

    Args:
        content: a parsed annotation file (`solov2.data.annotations.load_json`); its entries may be malformed.
        images: the folder that `file_name` is relative to.
        config: its scale ranges, grids and sizes, and `data.crowd`, are what the data is checked against.
        workers: number of checking processes; 0 and 1 check in this one.

    Raises:
        InputError: the folder does not exist, or a checking process was killed.
    """
    require_folder(Path(images))
    original, crowd, max_pixels = content, config.data.crowd, config.data.max_image_pixels
    findings = list(_problem_findings(original, max_pixels))
    content, changes = normalize(original, Path(images), crowd=crowd, max_pixels=max_pixels)
    findings += _notation_findings(content, changes)
    faulty = {(problem.section, problem.index) for problem in find_problems(content, max_pixels=max_pixels)}
    usable = {s: [entry for i, entry in enumerate(content[s]) if (s, i) not in faulty] for s in SECTIONS}
    findings += _annotation_file_findings(usable, _file_names(content["images"]))
    categories = sorted(usable["categories"], key=lambda category: category["id"])
    records = [ImageRecord(x["id"], x["file_name"], int(x["height"]), int(x["width"])) for x in usable["images"]]
    annotations: dict[ImageId, list[dict]] = defaultdict(list)
    for entry in usable["annotations"]:
        annotations[entry["image_id"]].append(entry)
    labels = {category["id"]: label for label, category in enumerate(categories)}
    settings = check_settings(config, Path(images), labels)
    check = functools.partial(check_image, settings=settings)
    checks = check_images(check, records, [annotations[record.image_id] for record in records], workers)
    found = [finding for check in checks for finding in check.findings]
    unusable = {f.image_id: f.message for f in found if f.kind in UNUSABLE_FILES and f.image_id is not None}
    findings += found
    repaired: Mapping[str, Any] = original
    if changes or any(finding.kind in REPAIRABLE for finding in findings):
        repaired, changes = repair(original, Path(images), unusable, crowd=crowd, max_pixels=max_pixels)
    names = [category["name"] for category in categories]
    statistics = summarize(checks, [record.image_id for record in records], names, config)
    return Report(_with_fixes(findings, content, changes), statistics, repaired, changes)


def check_settings(config: Config, images: Path, labels: dict[int, int]) -> CheckSettings:
    """What images are checked against; `labels` are those of the category ids of the instances."""
    short_edges = config.data.train_scales
    return CheckSettings(
        root=images,
        labels=labels,
        short_edges=tuple(sorted({min(short_edges), max(short_edges)})),
        long_edge=config.data.train_long_edge,
        min_size=config.data.min_image_size,
        max_pixels=config.data.max_image_pixels,
        assign=build_assigner(replace(config.model, num_classes=max(1, len(labels)))),
    )


def _problem_findings(content: Mapping[str, Any], max_pixels: int) -> Iterator[Finding]:
    """Findings of what would stop loading."""
    names = _file_names(content["images"])
    for problem in find_problems(content, max_pixels=max_pixels):
        entry = content[problem.section][problem.index]
        entry = entry if isinstance(entry, dict) else {}
        image_id = entry.get({"images": "id", "annotations": "image_id"}.get(problem.section, ""))
        image_id = image_id if isinstance(image_id, int) else None
        annotation_id = entry.get("id") if problem.section == "annotations" else None
        name = None if image_id is None else names.get(image_id)
        message = problem.message if problem.section != "categories" else f"{problem.where} {problem.message}"
        name, place = name if isinstance(name, str) else None, (problem.section, problem.index)
        yield Finding(problem.kind, message, image_id, annotation_id, name, place)


def _notation_findings(content: Mapping[str, Any], changes: Sequence[Change]) -> Iterator[Finding]:
    """Findings of what loading would stumble over later than `find_problems`, and `normalize` has corrected."""
    names = _file_names(content["images"])
    for change in changes:
        if change["kind"] in NOTATION:
            section, index = change["section"], change["index"]
            image_id = change["id"] if section == "images" else content[section][index]["image_id"]
            annotation_id = None if section == "images" else change["id"]
            place = (section, index)
            yield Finding(change["kind"], change["reason"], image_id, annotation_id, names.get(image_id), place)


def _annotation_file_findings(usable: Mapping[str, list[dict]], names: Mapping[int, Any]) -> Iterator[Finding]:
    """Findings of the entries that loading accepts, taken together; `names` are the files of all images."""
    annotations, sizes = usable["annotations"], {x["id"]: (x["height"], x["width"]) for x in usable["images"]}
    crowds = count_crowds(annotations)
    if crowds > MAX_CROWD_SHARE * len(annotations):
        yield Finding("many crowds", crowd_message(crowds, len(annotations)))
    if lacks_masks(annotations):
        yield Finding("no masks", NO_MASKS)
    boxes = [(*a["bbox"], *sizes[a["image_id"]]) for a in annotations if a["image_id"] in sizes]
    table = np.array(boxes, dtype=np.float64).reshape(-1, 6)
    if boxes_look_like_corners(table[:, :4], table[:, 4:]):
        yield Finding("boxes as corners", CORNERS)
    for annotation in annotations:
        if annotation["id"] == 0:
            text = "has the id 0, which pycocotools takes for 'no match': evaluation counts it as missed"
            yield Finding("id 0", text, annotation["image_id"], 0, names[annotation["image_id"]])
    yield from duplicate_files(usable["images"])
    yield from category_findings(annotations, usable["categories"], names)


def _file_names(images: Sequence[Any]) -> dict[int, Any]:
    return {image["id"]: image.get("file_name") for image in images if has_id(image)}


def _with_fixes(findings: Sequence[Finding], content: Mapping[str, Any], changes: Sequence[Change]) -> list[Finding]:
    """The findings with what `repair` did to their entries."""
    places: dict[tuple[str, ImageId | None], tuple[str, int]] = {
        (section, entry["id"]): (section, index)
        for section in ("images", "annotations")
        for index, entry in reversed(list(enumerate(content[section])))
        if has_id(entry)
    }
    removed, changed = (
        {(change["section"], change["index"]) for change in changes if change["action"] == action}
        for action in ("removed", "changed")
    )

    def fix(finding: Finding) -> str | None:
        if finding.kind not in REPAIRABLE:
            return None
        if finding.place is None and finding.image_id is None:  # of the whole file
            return "repairs" if changed else None
        of_image = finding.annotation_id is None
        key = ("images", finding.image_id) if of_image else ("annotations", finding.annotation_id)
        place = finding.place or places.get(key)
        if place in removed:
            return "removes"
        # An annotation whose image remained unknown would be removed, so this one's image got its id.
        return "repairs" if place in changed or finding.kind == "unknown image" else None

    return [finding._replace(fix=fix(finding)) for finding in findings]


def check_images(
    check: Callable[[Any, Any], Checked], records: Sequence[Any], annotations: Sequence[Any], workers: int
) -> list[Checked]:
    """`check(record, annotation)` for every image, in order, by several processes.

    Raises:
        InputError: a checking process was killed.
    """
    progress = functools.partial(tqdm, total=len(records), unit="image", disable=len(records) <= CHUNK, leave=False)
    if workers <= 1 or len(records) <= CHUNK:
        return list(progress(map(check, records, annotations)))
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(progress(pool.map(check, records, annotations, chunksize=CHUNK)))
        except BrokenProcessPool as error:
            raise InputError("a checking process was killed, perhaps out of memory; try --workers 1") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def duplicate_files(images: Sequence[dict]) -> Iterator[Finding]:
    """Findings of images that name the file of an earlier one."""
    first: dict[str, ImageId] = {}
    for image in images:
        other = first.setdefault(normalize_file_name(image["file_name"]), image["id"])
        if other != image["id"]:
            yield Finding("file twice", f"is also listed as image {other}", image["id"], None, image["file_name"])


def category_findings(
    annotations: Sequence[dict], categories: Sequence[dict], names: Mapping[int, Any]
) -> Iterator[Finding]:
    """Findings of category ids that are off by one, unknown or unused, and of names that occur twice."""
    declared = [category["id"] for category in categories]
    used = Counter(annotation["category_id"] for annotation in annotations)
    shift = category_id_shift(used, declared)
    if shift:
        yield Finding("categories off by one", off_by_one_message(shift, set(used), declared))
    known = set(declared)
    for annotation in annotations:
        if annotation["category_id"] not in known:
            text = f"category_id {annotation['category_id']} is not in `categories`; training leaves it out"
            image_id = annotation["image_id"]
            yield Finding("unknown category", text, image_id, annotation["id"], names.get(image_id))
    first: dict[str, int] = {}
    for category in categories:
        if not used[category["id"]] and not shift:
            yield Finding("unused category", f"category {category['id']} '{category['name']}' has no annotations")
        other = first.setdefault(category["name"], category["id"])
        if other != category["id"]:
            text = f"categories {other} and {category['id']} are both named '{category['name']}'"
            yield Finding("category name twice", text)
