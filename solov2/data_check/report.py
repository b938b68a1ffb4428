"""The report of a checked data set, for people and for programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from solov2.config import Config, config_folder, find_config
from solov2.data_check.check import Report
from solov2.data_check.findings import REPAIRABLE, SEVERITIES, Finding
from solov2.errors import printable


def report_lines(report: Report, source: Path, config: Config, *, model: str | Path, show: int) -> list[str]:
    """The report for people.

    Args:
        report: to be told.
        source: the annotation file.
        config: what it was checked against.
        model: the name or the file that `config` was made of.
        show: how many findings of a kind are written out at most.
    """
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
    lines += statistics_lines(figures, config)
    if figures["suggestion"] is not None:
        lines += ["", *proposal(figures["suggestion"], model)]
    return [printable(line) for line in lines]


def statistics_lines(figures: Mapping[str, Any], config: Config) -> list[str]:
    """The figures of `summarize` for people."""
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
    return lines if figures["suggestion"] is not None else [*lines, "  too few instances to suggest sizes"]


def proposal(suggestion: Mapping[str, Any], model: str | Path) -> list[str]:
    """A configuration file with the suggestion of `summarize` over the name or file of a model."""
    path = find_config(model).resolve()
    base = path.stem if path.parent == config_folder().resolve() else str(path)
    text = yaml.safe_dump({"base": base, **suggestion}, default_flow_style=None, sort_keys=False, width=120)
    return [
        "# Sizes that are to this data set what the published ones are to COCO. Save this block as a file, for example",
        "# mine.yaml, and give that file to train in place of the model's name.",
        *text.splitlines(),
    ]


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
