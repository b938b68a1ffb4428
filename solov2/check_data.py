"""Check a COCO data set before training: `python -m solov2.check_data instances.json --images DIR`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from solov2.build import build_assigner
from solov2.config import Config, InputError, load_config
from solov2.data.annotations import ImageRecord, find_problems, load_json, shift_of_categories
from solov2.data.check import REPAIRABLE, SEVERITIES, CheckSettings, Finding, ImageCheck, check_image
from solov2.data.coco import CocoInstances
from solov2.data.repair import normal_name, repair
from solov2.data.statistics import summarize, unseen_by_range
from solov2.errors import printable, run_command
from solov2.outputs import check_output, write_json

UNUSABLE_FILES = ("missing file", "unreadable file", "wrong size")
CHUNK = 8  # images that a process takes at a time


@dataclass(frozen=True)
class Report:
    """All findings, in the order file, images, annotations; the figures of `solov2.data.statistics.summarize`."""

    findings: list[Finding]
    statistics: dict[str, Any]

    def counts(self) -> dict[str, int]:
        """Findings by severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in ("error", "warning", "note")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process where None.

    Returns:
        0 without errors in the data, 1 with some, 2 for a mistake in what was asked for, 130 after Ctrl-C.
    """
    return run_command(
        lambda words: _run(_parser().parse_args(words)), argv, interrupted="interrupted; nothing was written"
    )


def check_data(content: Mapping[str, Any], images: str | Path, config: Config, *, workers: int = 0) -> Report:
    """Check annotations and image files; every file is read once.

    Args:
        content: a parsed annotation file (`solov2.data.annotations.load_json`); its entries may be anything.
        images: the folder that `file_name` is relative to.
        config: scale ranges, grids and sizes to check against.
        workers: processes; 0 and 1 work in this one.

    Raises:
        InputError: the folder does not exist, or a process was killed.
    """
    if not Path(images).is_dir():
        raise InputError(f"image folder {images} does not exist")
    findings, faulty = file_findings(content)
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


def file_findings(content: Mapping[str, Any]) -> tuple[list[Finding], set[tuple[str, int]]]:
    """What the annotation file alone shows, and (section, index) of the entries that loading would stop at."""
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
    findings += _files_twice(usable["images"])
    findings += _category_findings(usable["annotations"], usable["categories"], names)
    return findings, faulty


def check_images(
    records: Sequence[ImageRecord], annotations: Sequence[Sequence[dict]], settings: CheckSettings, workers: int
) -> list[ImageCheck]:
    """`check_image` of every image, in their order, in some processes.

    Raises:
        InputError: a process was killed.
    """
    check = functools.partial(check_image, settings=settings)
    progress = functools.partial(tqdm, total=len(records), unit="image", disable=len(records) <= CHUNK, leave=False)
    if workers <= 1 or len(records) <= CHUNK:
        return list(progress(map(check, records, annotations)))
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(progress(pool.map(check, records, annotations, chunksize=CHUNK)))
        except BrokenProcessPool as error:
            raise InputError("a checking process was killed, perhaps for lack of memory; try --workers 1") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def quick_check(dataset: CocoInstances, config: Config) -> list[str]:
    """What an opened training set shows without another look at a file: sentences for people, none where all is well.

    Args:
        dataset: opened with `training=True`.
        config: of the run; its training sizes and scale ranges count.
    """
    positions, labels, boxes = dataset.instance_table()
    sentences = []
    used = {dataset.category_ids[label] for label in set(labels.tolist())} | set(dataset.unknown_categories)
    shift = shift_of_categories(used, dataset.category_ids)
    if shift:
        sentences.append(_off_by_one(shift, used, dataset.category_ids))
    present = set(labels.tolist())
    missing = [name for label, name in enumerate(dataset.class_names) if label not in present]
    if missing and not shift:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        sentences.append(
            f"{len(missing)} of {len(dataset.class_names)} classes have no instance and cannot be learnt: "
            f"{', '.join(missing[:8])}{more}"
        )
    unseen = unseen_by_range(boxes, dataset.image_sizes()[positions], config.model, config.data)
    if unseen.any():
        sentences.append(
            f"{unseen.sum()} of {len(unseen)} instances ({unseen.mean():.1%}) are of a size in no entry of "
            "model.scale_ranges at the training size and are not learnt; python -m solov2.check_data suggests others"
        )
    return [printable(sentence) for sentence in sentences]


def _off_by_one(shift: int, used: set[int], declared: Sequence[int]) -> str:
    return (
        f"category ids look off by one: {min(used)} to {max(used)} are used and {min(declared)} to {max(declared)} "
        f"declared, so every instance learns the class {'before' if shift > 0 else 'after'} its own; "
        f"add {shift} to each category_id"
    )


def _files_twice(images: Sequence[dict]) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for image in images:
        other = first.setdefault(normal_name(image["file_name"]), image["id"])
        if other != image["id"]:
            yield Finding("file twice", f"is listed as image {other}, too", image["id"], None, image["file_name"])


def _category_findings(
    annotations: Sequence[dict], categories: Sequence[dict], names: Mapping[int, Any]
) -> Iterator[Finding]:
    declared = [category["id"] for category in categories]
    used = Counter(annotation["category_id"] for annotation in annotations)
    shift = shift_of_categories(used, declared)
    if shift:
        yield Finding("categories off by one", _off_by_one(shift, set(used), declared))
    for annotation in annotations:
        if annotation["category_id"] not in declared:
            text = f"category_id {annotation['category_id']} is not in `categories`: left out"
            image_id = annotation["image_id"]
            yield Finding("unknown category", text, image_id, annotation["id"], names.get(image_id))
    first: dict[str, int] = {}
    for category in categories:
        if not used[category["id"]] and not shift:
            yield Finding("unused category", f"category {category['id']} '{category['name']}' never occurs")
        other = first.setdefault(category["name"], category["id"])
        if other != category["id"]:
            text = f"categories {other} and {category['id']} are both called '{category['name']}'"
            yield Finding("category name twice", text)


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.set)
    changes_file = None if args.fix is None else args.fix.with_name(f"{args.fix.name}.changes.json")
    if args.json is not None and _same(args.json, args.annotations):
        raise InputError(f"--json {args.json} would replace the annotations; name another file")
    check_output(args.json, "--json", overwrite=args.overwrite)
    for path in (args.fix, changes_file):
        if path is not None and path.exists():
            raise InputError(f"{path} exists already and is not overwritten; name another file")
        check_output(path, "--fix", overwrite=False)
    content = load_json(args.annotations)
    report = check_data(content, args.images, config, workers=args.workers)
    print("\n".join(report_lines(report, args.annotations, config, show=args.show)))
    if args.json is not None:
        write_json(args.json, to_json(report, args.annotations, config), indent=1)
    if args.fix is not None:
        print(_write_repaired(content, report, args.fix, changes_file))
    return 1 if report.counts()["error"] else 0


def _write_repaired(content: dict[str, Any], report: Report, path: Path, changes_file: Path) -> str:
    unusable = {f.image_id: f.message for f in report.findings if f.kind in UNUSABLE_FILES}
    repaired, changes = repair(content, unusable)
    if not repaired["images"] or not repaired["annotations"] or not repaired["categories"]:
        raise InputError(f"nothing usable would be left in {path}, so it is not written")
    write_json(changes_file, changes, indent=1)
    write_json(path, repaired)
    removed = Counter(change["section"] for change in changes if change["action"] == "removed")
    parts = ", ".join(f"{count} {section}" for section, count in removed.items()) or "nothing"
    return f"wrote {path}: {len(changes)} changes, {parts} removed; {changes_file} lists them"


def report_lines(report: Report, source: Path, config: Config, *, show: int) -> list[str]:
    """The report for people; at most `show` findings of a kind are written out."""
    figures, counts = report.statistics, report.counts()
    lines = [f"{source}: {figures['images']} images, {figures['instances']} usable instances"]
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        by_kind[finding.kind].append(finding)
    for kind in sorted(by_kind, key=lambda kind: (("error", "warning", "note").index(SEVERITIES[kind]), kind)):
        found = by_kind[kind]
        lines.append(f"{SEVERITIES[kind]}: {kind} ({len(found)}{', --fix repairs it' if kind in REPAIRABLE else ''})")
        lines += [f"    {finding.sentence()}" for finding in found[:show]]
        if len(found) > show:
            lines.append(f"    and {len(found) - show} more: --json and --show {len(found)} list them")
    lines.append(", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items()))
    return [printable(line) for line in [*lines, *statistics_lines(figures, config)]]


def statistics_lines(figures: Mapping[str, Any], config: Config) -> list[str]:
    """The figures of `summarize` for people, with the suggestion as YAML."""
    data, model = config.data, config.model
    size = f"short edge {max(data.train_scales)}, long edge at most {data.train_long_edge}"
    lines = [f"against {config.name}, {size}:"]
    if not figures["instances"]:
        return [*lines, "  no usable instance"]
    sizes = ", ".join(f"{percent} % {value:g}" for percent, value in figures["size_percentiles"].items())
    lines.append(f"  size of instances, sqrt(box area) in px: {sizes}")
    levels = zip(model.grid_sizes, model.scale_ranges, figures["instances_per_level"])
    lines += [f"  grid {grid:>2}, sizes {low:g} to {high:g}: {count} instances" for grid, (low, high), count in levels]
    unseen, hidden = len(figures["unseen_instances"]), len(figures["hidden_instances"])
    crowded = len(figures["shared_cells_by_image"])
    lines.append(
        f"  {unseen} instances without a cell, {hidden} whose cells all go to another; "
        f"{figures['shared_cells']} cells claimed twice, in {crowded} images"
    )
    counts = sorted(figures["instances_by_class"].items(), key=lambda item: -item[1])
    present = [(name, count) for name, count in counts if count]
    shown = present if len(present) <= 10 else [*present[:5], ("...", ""), *present[-3:]]
    lines.append(
        f"  classes: {len(present)} of {len(counts)} occur: " + ", ".join(f"{n} {c}".strip() for n, c in shown)
    )
    suggestion = figures["suggestion"]
    if suggestion is None:
        return [*lines, "  too few instances to suggest sizes"]
    text = yaml.safe_dump(suggestion, default_flow_style=None, sort_keys=False, width=120)
    return [*lines, "sizes in the published model's proportion to its instances:", *text.splitlines()]


def to_json(report: Report, source: Path, config: Config) -> dict[str, Any]:
    """The report for programs."""
    findings = [{"severity": f.severity, "repairable": f.kind in REPAIRABLE, **f._asdict()} for f in report.findings]
    return {
        "annotations": str(source),
        "config": config.name,
        "counts": report.counts(),
        "findings": findings,
        "statistics": report.statistics,
    }


def _same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m solov2.check_data", description=__doc__)
    parser.add_argument("annotations", type=Path, help="annotation file in COCO's JSON format")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    parser.add_argument("--config", default="solov2_r50_fpn_1x", metavar="NAME", help="what to check sizes against")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change an entry of --config")
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help=f"processes, default {workers}")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="findings of a kind to print, default 20")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings and figures")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --json file")
    parser.add_argument(
        "--fix", type=Path, metavar="OUT", help="write a repaired annotation file, and what changed to OUT.changes.json"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
