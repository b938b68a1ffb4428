"""The report on a checked dataset, as text and as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from solov2.config import Config, config_folder, find_config
from solov2.data_check.check import Report
from solov2.data_check.findings import Finding
from solov2.errors import printable


def report_lines(report: Report, source: Path, config: Config, *, model: str | Path, show: int) -> list[str]:
    """The report as lines of text.

    Args:
        report: what `check_data` returned.
        source: the annotation file.
        config: what it was checked against.
        model: name or file that `config` was loaded from.
        show: maximum number of findings of a kind to list.
    """
    statistics, counts = report.statistics, report.counts()
    lines = [f"{source}: {statistics['images']} images, {statistics['instances']} usable instances"]
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        by_kind[finding.kind].append(finding)
    for kind in sorted(by_kind, key=lambda kind: (("error", "warning", "note").index(by_kind[kind][0].severity), kind)):
        found = by_kind[kind]
        lines.append(f"{found[0].severity}: {kind} ({len(found)}{_fix_text(found)})")
        lines += [f"    {finding.sentence()}" for finding in found[:show]]
        if len(found) > show:
            lines.append(f"    and {len(found) - show} more (--show {len(found)} or --json lists them all)")
    lines.append(", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items()))
    lines += statistics_lines(statistics, config)
    lines += panoptic_lines(statistics["panoptic"]) if "panoptic" in statistics else []
    if statistics["suggestion"] is not None:
        lines += ["", *suggested_config(statistics["suggestion"], model)]
    return [printable(line) for line in lines]


def _fix_text(findings: Sequence[Finding]) -> str:
    """What --fix does about these findings, such as ", --fix repairs 3 and removes 1"."""
    fixes = Counter(finding.fix for finding in findings if finding.fix is not None)
    if len(fixes) == 1 and fixes.total() == len(findings):
        return f", --fix {next(iter(fixes))} {'it' if len(findings) == 1 else 'them'}"
    parts = [f"{fix} {fixes[fix]}" for fix in ("repairs", "removes") if fixes[fix]]
    return f", --fix {' and '.join(parts)}" if parts else ""


def statistics_lines(statistics: Mapping[str, Any], config: Config) -> list[str]:
    """The statistics of `summarize` as lines of text."""
    data, model = config.data, config.model
    size = f"short edge {max(data.train_scales)}, long edge at most {data.train_long_edge}"
    lines = [f"checked against {config.name}, {size}:"]
    if not statistics["instances"]:
        return [*lines, "  no usable instance"]
    sizes = ", ".join(f"{percent} % {value:g}" for percent, value in statistics["size_percentiles"].items())
    lines.append(f"  percentiles of instance size, sqrt(box area) in px: {sizes}")
    levels = zip(model.grid_sizes, model.scale_ranges, statistics["instances_per_level"])
    lines += [f"  grid {grid:>2}, sizes {low:g} to {high:g}: {count} instances" for grid, (low, high), count in levels]
    unseen, hidden = len(statistics["unseen_instances"]), len(statistics["hidden_instances"])
    crowded = len(statistics["shared_cells_by_image"])
    lines.append(
        f"  {unseen} instances without a cell, {hidden} whose cells all go to other instances; "
        f"{statistics['shared_cells']} cells claimed more than once, in {crowded} images"
    )
    counts = sorted(statistics["instances_by_class"].items(), key=lambda item: -item[1])
    present = [(name, count) for name, count in counts if count]
    shown = present if len(present) <= 10 else [*present[:5], ("...", ""), *present[-3:]]
    lines.append(
        f"  {len(present)} of {len(counts)} classes have instances: " + ", ".join(f"{n} {c}".strip() for n, c in shown)
    )
    return lines if statistics["suggestion"] is not None else [*lines, "  too few instances to suggest sizes"]


def panoptic_lines(statistics: Mapping[str, Any]) -> list[str]:
    """The statistics of `panoptic_statistics` as lines of text."""
    classes = statistics["stuff"]
    counts = sorted(
        ((values["segments"], name) for name, values in classes.items() if values["segments"]), reverse=True
    )
    shown = ", ".join(f"{name} {number} ({classes[name]['share']:.1%})" for number, name in counts[:10])
    more = f" and {len(counts) - 10} more" if len(counts) > 10 else ""
    return [
        f"  void: {statistics['void_share']:.1%} of all pixels, more than half of {statistics['mostly_void']} images",
        f"  {statistics['images_without_things']} images without things, {statistics['images_without_stuff']} without "
        f"stuff, {statistics['crowds']} crowds",
        f"  {len(counts)} of {len(classes)} stuff classes have segments (share of pixels): {shown}{more}",
    ]


def suggested_config(suggestion: Mapping[str, Any], model: str | Path) -> list[str]:
    """Lines of a configuration file: the suggestion of `summarize` on top of the configuration `model`."""
    path = find_config(model).resolve()
    base = path.stem if path.parent == config_folder().resolve() else str(path)
    text = yaml.safe_dump({"base": base, **suggestion}, default_flow_style=None, sort_keys=False, width=120)
    return [
        "# Sizes that suit this dataset as the published ones suit COCO. Save this block to a file, such as mine.yaml,",
        "# and pass that file to train instead of the model's name.",
        *text.splitlines(),
    ]


def to_json(report: Report, source: Path, config: Config) -> dict[str, Any]:
    """The report as JSON types."""
    findings = [{"severity": finding.severity, **finding._asdict()} for finding in report.findings]
    return {
        "annotations": str(source),
        "config": config.name,
        "counts": report.counts(),
        "findings": findings,
        "statistics": report.statistics,
    }
