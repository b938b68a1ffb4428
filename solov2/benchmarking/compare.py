"""Two reports of the benchmark side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from solov2.benchmarking.tables import TITLES
from solov2.errors import InputError

ENVIRONMENT: tuple[str, ...] = ("device", "device_name", "cpu", "cpu_count", "threads", "processes")
ENVIRONMENT += ("python", "torch", "torchvision", "commit")
WORKLOAD = ("config", "size", "batch_size", "precision", "candidates", "instances")

Key = tuple[str, ...]


def read_report(path: str) -> dict[str, Any]:
    """A report that `--json` wrote.

    Raises:
        InputError: missing, no JSON, or JSON of something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--compare {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--compare {path} is not JSON, it may be truncated ({error})") from error
    try:
        list(figures(content))
        dict(content["environment"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--compare {path} is not a report of benchmark.py --json") from error
    return content


def figures(content: dict[str, Any]) -> Iterator[tuple[Key, str, str, float]]:
    """(workload, part, stage, median ms) of everything in a report."""
    for report in content["reports"]:
        report = {**{key: content["settings"].get(key) for key in ("candidates", "instances")}, **report}
        workload = tuple(str(report[key]) for key in WORKLOAD)
        for name, part in report.items():
            if isinstance(part, dict) and "stages" in part:
                for stage, values in part["stages"].items():
                    yield workload, name, stage, float(values["median_ms"])


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A warning for each part of the environment that differs; what an older report did not record is passed over."""
    return [
        f"{key} differs: {old[key]} (old), {new[key]} (new)"
        for key in ENVIRONMENT
        if key in old and key in new and old[key] != new[key]
    ]


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Ratios old / new (above 1 the new one is faster) of every stage that both reports have, after the warnings."""
    lines = [f"warning: {text}" for text in differences(old["environment"], new["environment"])]
    earlier = {key[:3]: key[3] for key in figures(old)}
    heading: Key | None = None
    title = None
    missing: list[Key] = []
    known = {workload for workload, _, _ in earlier}
    for workload, part, stage, milliseconds in figures(new):
        if workload not in known:
            if workload not in missing:
                missing.append(workload)
            continue
        before = earlier.get((workload, part, stage))
        if before is None:
            continue
        if workload != heading:
            heading, title = workload, None
            lines.append(_name(workload))
        if part != title:
            title = part
            lines.append(f"  {TITLES.get(part, part):<36}{'old ms':>12}{'new ms':>12}{'old / new':>12}")
        ratio = f"{before / milliseconds:.2f}" if milliseconds else "-"
        lines.append(f"    {stage:<34}{before:>12.2f}{milliseconds:>12.2f}{ratio:>12}")
    lines += [f"the old report has nothing on {_name(workload)}" for workload in missing]
    return "\n".join(lines)


def _name(workload: Key) -> str:
    config, size, batch, precision, candidates, instances = workload
    height, _, width = size.strip("[]").partition(", ")
    return f"{config}: {height} x {width}, batch {batch}, {precision}, {candidates} candidates, {instances} instances"
