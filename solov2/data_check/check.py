"""Check a COCO dataset before training: the annotation file and every image."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from solov2.build import build_assigner
from solov2.config import Config
from solov2.data.annotations import ImageRecord, category_id_shift, find_problems
from solov2.data_check.findings import CheckSettings, Finding, ImageCheck, check_image
from solov2.data_check.quick import off_by_one_message
from solov2.data_check.repair import normalize_file_name
from solov2.data_check.statistics import summarize
from solov2.errors import InputError

CHUNK = 8  # images that a checking process takes at a time


@dataclass(frozen=True)
class Report:
    """All findings, first of the annotation file, then image by image, and the statistics of `summarize`."""

    findings: list[Finding]
    statistics: dict[str, Any]

    def counts(self) -> dict[str, int]:
        """Number of findings of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in ("error", "warning", "note")}


def check_data(content: Mapping[str, Any], images: str | Path, config: Config, *, workers: int = 0) -> Report:
    """Check annotations and image files; every file is read once.

    Args:
        content: a parsed annotation file (`solov2.data.annotations.load_json`); its entries may be malformed.
        images: the folder that `file_name` is relative to.
        config: its scale ranges, grids and sizes are what the data is checked against.
        workers: number of checking processes; 0 and 1 check in this one.

    Raises:
        InputError: the folder does not exist, or a checking process was killed.
    """
    if not Path(images).is_dir():
        raise InputError(f"image folder {images} does not exist")
    findings, faulty = _annotation_file_findings(content)
    categories = [entry for index, entry in enumerate(content["categories"]) if ("categories", index) not in faulty]
    categories.sort(key=lambda category: category["id"])
    records = [
        ImageRecord(entry["id"], entry["file_name"], int(entry["height"]), int(entry["width"]))
        for index, entry in enumerate(content["images"])
        if ("images", index) not in faulty
    ]
    annotations: dict[int, list[dict]] = defaultdict(list)
    for index, entry in enumerate(content["annotations"]):
        if ("annotations", index) not in faulty:
            annotations[entry["image_id"]].append(entry)
    short_edges = config.data.train_scales
    settings = CheckSettings(
        root=Path(images),
        labels={category["id"]: label for label, category in enumerate(categories)},
        short_edges=tuple(sorted({min(short_edges), max(short_edges)})),
        long_edge=config.data.train_long_edge,
        min_size=config.data.min_image_size,
        assign=build_assigner(replace(config.model, num_classes=max(1, len(categories)))),
    )
    checks = check_images(records, [annotations[record.image_id] for record in records], settings, workers)
    findings += [finding for check in checks for finding in check.findings]
    names = [category["name"] for category in categories]
    statistics = summarize(checks, [record.image_id for record in records], names, config)
    return Report(findings, statistics)


def _annotation_file_findings(content: Mapping[str, Any]) -> tuple[list[Finding], set[tuple[str, int]]]:
    """Findings of the annotation file alone, and (section, index) of the entries that would stop loading."""
    findings, faulty = [], set()
    names = {
        image["id"]: image.get("file_name")
        for image in content["images"]
        if isinstance(image, dict) and isinstance(image.get("id"), int)
    }
    for problem in find_problems(content):
        faulty.add((problem.section, problem.index))
        entry = content[problem.section][problem.index]
        entry = entry if isinstance(entry, dict) else {}
        image_id = entry.get({"images": "id", "annotations": "image_id"}.get(problem.section, ""))
        image_id = image_id if isinstance(image_id, int) else None
        annotation_id = entry.get("id") if problem.section == "annotations" else None
        name = names.get(image_id)
        message = problem.message if problem.section != "categories" else f"{problem.where} {problem.message}"
        findings.append(
            Finding(problem.kind, message, image_id, annotation_id, name if isinstance(name, str) else None)
        )
    usable = {
        section: [entry for index, entry in enumerate(content[section]) if (section, index) not in faulty]
        for section in ("images", "annotations", "categories")
    }
    findings += _duplicate_files(usable["images"])
    findings += _category_findings(usable["annotations"], usable["categories"], names)
    return findings, faulty


def check_images(
    records: Sequence[ImageRecord], annotations: Sequence[Sequence[dict]], settings: CheckSettings, workers: int
) -> list[ImageCheck]:
    """`check_image` for every image, in order, by several processes.

    Raises:
        InputError: a checking process was killed.
    """
    check = functools.partial(check_image, settings=settings)
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


def _duplicate_files(images: Sequence[dict]) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for image in images:
        other = first.setdefault(normalize_file_name(image["file_name"]), image["id"])
        if other != image["id"]:
            yield Finding("file twice", f"is also listed as image {other}", image["id"], None, image["file_name"])


def _category_findings(
    annotations: Sequence[dict], categories: Sequence[dict], names: Mapping[int, Any]
) -> Iterator[Finding]:
    declared = [category["id"] for category in categories]
    used = Counter(annotation["category_id"] for annotation in annotations)
    shift = category_id_shift(used, declared)
    if shift:
        yield Finding("categories off by one", off_by_one_message(shift, set(used), declared))
    for annotation in annotations:
        if annotation["category_id"] not in declared:
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
