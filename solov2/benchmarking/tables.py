"""The benchmark's text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TITLES = {
    "inference": "inference",
    "inference_optimized": "inference, model.optimize()",
    "training": "training step",
    "loading": "training data, one thread",
    "nms_coco_classes": "Matrix NMS, classes as in COCO",
    "nms_one_class": "Matrix NMS, one class",
    "postprocess": "post-processing to planes",
    "postprocess_rle": "post-processing to run lengths",
    "evaluation": "evaluation of results",
}
UNITS = {"batch": "image", "size": "megapixel", "candidates": "candidate", "instances": "instance"}


def format_machine(machine: dict[str, Any]) -> str:
    """The machine and the versions in one line."""
    processes = f", {machine['processes']} processes" if machine["processes"] > 1 else ""
    return (
        f"{machine['device_name']} ({machine['device']}), {machine['threads']} threads{processes}, torch "
        f"{machine['torch']}, torchvision {machine['torchvision']}, solov2 {machine['solov2']} "
        f"(commit {machine['commit'] or 'unknown'}); {machine['cpu_count']} cores, load "
        f"{_number(machine['load'], '.1f')} before the start"
    )


def format_peak(peak: dict[str, Any]) -> str:
    """The roof and which convolution reached it."""
    return (
        f"convolution peak {peak['gflop_per_second']:.1f} GFLOP/s in {peak['precision']}: "
        f"{peak['convolution']}, the best of {len(peak['convolutions'])}"
    )


def format_workload(report: dict[str, Any]) -> str:
    """The headline of a configuration."""
    height, width = report["size"]
    return (
        f"{report['config']}: {height} x {width}, batch {report['batch_size']}, {report['precision']}, "
        f"{report['parameters'] / 1e6:.1f} M parameters"
    )


def format_part(name: str, part: dict[str, Any]) -> str:
    """The table of one measured part, with a line per stage."""
    total = part["stages"]["total"]["median_ms"]
    title = f"{TITLES[name]} ({part['iterations']} after {part['warmup']})"
    lines = [f"  {title:<46}{'median ms':>10}{'p90 ms':>10}{'share':>8}{'GFLOP':>9}{'GFLOP/s':>9}{'of peak':>9}"]
    for stage, figures in part["stages"].items():
        rates = _number(figures["gflop"], ".3g"), _number(figures["gflop_per_second"], ".1f")
        lines.append(
            f"    {stage:<44}{figures['median_ms']:>10.2f}{figures['p90_ms']:>10.2f}"
            f"{figures['median_ms'] / total:>8.1%}{rates[0]:>9}{rates[1]:>9}"
            f"{_number(figures['share_of_peak'], '.0%'):>9}"
        )
    return "\n".join([*lines, *(f"    {line}" for line in _footer(name, part))])


def _footer(name: str, part: dict[str, Any]) -> list[str]:
    memory = "" if part["step_memory_mib"] is None else f", {part['step_memory_mib']:.0f} MiB of it added by a step"
    if part["peak_memory_mib"] is not None:
        memory = f"; peak memory {part['peak_memory_mib']:.0f} MiB{memory}"
    several = f" over {part['processes']} processes" if part["processes"] > 1 else ""
    rate = f"{part['images_per_second']:.2f} images/s{several}, " if name not in ("evaluation", "loading") else ""
    lines = [f"{rate}stages sum to {part['sum_of_stages_ms']:.2f} ms{memory}"]
    if "candidates_per_image" in part:
        lines.append(
            f"decoded from synthetic outputs: {part['candidates_per_image']:.0f} candidates, "
            f"{part['instances_per_image']:.0f} instances per image"
        )
    if name == "training":
        lines.append(
            f"{part['images_per_second_without_targets']:.2f} images/s without the targets, which loader workers assign"
        )
    if name == "loading":
        lines.append(f"{part['images_per_second_per_worker']:.2f} images/s per worker, {part['source']}")
    if name == "evaluation":
        lines.append(
            f"{part['detections_per_second']:.0f} detections/s collected as run lengths; "
            f"AP of {part['detections']} detections on {part['images']} images in {part['ap_ms'] / 1000:.2f} s"
        )
    return lines


def format_sweep(over: str, rows: Sequence[dict[str, Any]]) -> str:
    """One table over the swept value; a row without figures says why."""
    unit = UNITS[over]
    heading = f"{over:>12}{'ms':>12}{'images/s':>12}{f'ms/{unit}':>16}{'peak MiB':>12}"
    lines, title = [], None
    for row in rows:
        failed = row["error"] is not None
        if title != (title := f"{row['config']}: {TITLES.get(row['part'], row['part'])}"):
            lines += [title] if failed else [title, heading]
        if failed:
            lines.append(f"{row['value']:>12}  {row['error']}")
            continue
        lines.append(
            f"{row['value']:>12}{row['ms']:>12.2f}{row['images_per_second']:>12.2f}"
            f"{_number(row['ms_per_unit'], '.3f'):>16}{_number(row['step_memory_mib'], '.0f'):>12}"
        )
    known = any(row["error"] is None and row["step_memory_mib"] is not None for row in rows)
    return "\n".join(
        [
            *lines,
            "peak MiB: the most that a step holds above model, optimiser and batch; every point in a process of its own"
            if known
            else "peak MiB is unknown: this system does not let a process reset its peak (/proc/self/clear_refs)",
        ]
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
