"""The tables of a benchmark, the comparison of two reports, and sweeps."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from solov2.errors import InputError

Report = Mapping[str, Any]
EXTRA_FIGURES = {  # that only some parts have
    "worker_images_per_second": "{:.2f} images/s per worker",
    "instances_per_image": "{:.0f} instances found per image",
    "segments_per_image": "{:.0f} segments",
    "loss_category": "category loss {:.3f}",
    "loss_mask": "mask loss {:.3f}",
    "loss_semantic": "semantic loss {:.3f}",
    "peak_memory_mib": "peak memory {:.0f} MiB",
}


def format_header(report: Report) -> str:
    """The header: what is measured, on which machine, and its convolution peak."""
    asked, machine, peak = report["settings"], report["environment"], report["peak"]
    height, width = asked["size"]
    lines = [
        f"{asked['model']}: {height} x {width}, batch {asked['batch_size']}, {asked['precision']}, "
        f"{asked['instances']} instances, {asked['candidates']} candidates; random weights, "
        + ("synthetic images" if asked["data_root"] is None else f"images of {asked['data_root']}"),
        f"{machine['device_name']} ({machine['device']}), {machine['processes']} x {machine['threads']} threads on "
        f"{machine['cpu_count']} cores, load {machine['load']}; torch {machine['torch']}, torchvision "
        f"{machine['torchvision']}, solov2 {machine['solov2']} (commit {machine['commit']})",
    ]
    if peak is not None:
        best = f"{peak['convolution']}, the best of {len(peak['convolutions'])}"
        lines.append(f"convolution peak {peak['gflop_per_second']:.1f} GFLOP/s in {peak['precision']}: {best}")
    return "\n".join(lines)


def format_part(name: str, part: Report, peak: Report | None) -> str:
    """The figures of a part and the table of its stages; `peak` is that of the report."""
    extra = [text.format(part[key]) for key, text in EXTRA_FIGURES.items() if part.get(key) is not None]
    lines = [
        f"\n{_title(name)}: {part['images_per_second']:.2f} images/s, {', '.join(extra)}",
        f"  totals, timed without a profiler: median {part['median_ms']:.2f} ms, p90 {part['p90_ms']:.2f} ms of "
        f"{part['iterations']} iterations; {part['queued_images_per_second']:.2f} images/s with one wait at the end",
        f"  stages, shares of a profiled pass of {part['profiled_iterations']} iterations, each "
        f"{part['profiler_cost']:.2f} times as long:",
        f"  {'stage':<20}{'share':>8}{'ms':>12}{'GFLOP':>10}{'GFLOP/s':>10}{'of peak':>9}",
    ]
    for stage, row in part["stages"].items():
        rate, rates = row["gflop"] / row["ms"] * 1000 if row["ms"] else 0.0, f"{'-':>10}{'-':>10}{'-':>9}"
        if rate and peak is not None:
            rates = f"{row['gflop']:>10.3g}{rate:>10.1f}{rate / peak['gflop_per_second']:>9.0%}"
        lines.append(f"  {stage:<20}{row['share']:>8.1%}{row['ms']:>12.2f}{rates}")
    return "\n".join(lines)


def _title(name: str) -> str:
    return name.replace("_", " ")


def read_report(path: str) -> Report:
    """Read a report written by `--json`.

    Raises:
        InputError: the file is missing, not JSON, or not the report of one run.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        compare(report, report)
    except OSError as error:
        raise InputError(f"--compare {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--compare {path} is not the report of one run, as --json writes it") from error
    return report


def compare(old: Report, new: Report) -> str:
    """A warning for each difference, and the ratios old / new of totals and stages (above 1, the new one is faster)."""
    lines = [
        f"warning: {key} differs: {old[section].get(key)} (old), {value} (new)"
        for section in ("environment", "settings", "model")
        for key, value in new[section].items()
        if key != "load" and old[section].get(key) != value
    ]
    for name, part in new["parts"].items():
        if name not in old["parts"]:
            lines.append(f"the old report has no {_title(name)}")
            continue
        lines.append(f"{_title(name):<22}{'old ms':>12}{'new ms':>12}{'old / new':>12}")
        for stage, row in part["stages"].items():
            if (before := old["parts"][name]["stages"].get(stage)) is not None:
                ratio = f"{before['ms'] / row['ms']:.2f}" if row["ms"] else "-"
                lines.append(f"  {stage:<20}{before['ms']:>12.2f}{row['ms']:>12.2f}{ratio:>12}")
    return "\n".join(lines)


def sweep(flag: str, commands: Mapping[str, Sequence[str]], show: Callable[[str], object]) -> dict[str, Any]:
    """Run a benchmark command for each value of a flag, each in a new process, so that peak memory is its own.

    Returns:
        {"sweep": flag, "reports": {value: report, or {"error": reason}}}
    """
    show(f"{flag:>12}  {'part':<22}{'ms':>12}{'images/s':>12}{'peak MiB':>12}")
    reports = {}
    for value, command in commands.items():
        report = reports[value] = _run_process(command)
        if "error" in report:
            show(f"{value:>12}  {report['error']}")
        for name, part in report.get("parts", {}).items():
            memory = "-" if part["peak_memory_mib"] is None else f"{part['peak_memory_mib']:.0f}"
            figures = f"{part['median_ms']:>12.2f}{part['images_per_second']:>12.2f}{memory:>12}"
            show(f"{value:>12}  {_title(name):<22}{figures}")
    return {"sweep": flag, "reports": reports}


def _run_process(command: Sequence[str]) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        process = subprocess.Popen(
            [*command, "--json", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            _, errors = process.communicate()
        except BaseException:  # a launcher ends its workers when terminated, but not when killed
            process.terminate()
            process.wait()
            raise
        if process.returncode == 0:
            return json.loads(path.read_text(encoding="utf-8"))
    if process.returncode < 0:
        return {"error": f"ended by signal {-process.returncode}, most likely out of memory"}
    lines = errors.strip().splitlines()
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return {"error": [*named, *lines[-1:], f"exit code {process.returncode}"][0]}
