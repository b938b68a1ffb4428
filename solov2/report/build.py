"""The report of a run, or of two side by side: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solov2.errors import InputError
from solov2.evaluation.summary import headline
from solov2.outputs import replace_file
from solov2.report.content import sections
from solov2.report.facts import Picture, RunFacts
from solov2.report.gather import Evaluated
from solov2.report.page import render
from solov2.report.pictures import choose_images, draw_pictures


def write_report(path: str | Path, runs: Sequence[RunFacts], pictures: Sequence[Picture] = ()) -> None:
    """Write the page; folders are created as needed.

    Args:
        path: of the HTML file.
        runs: one, or two that were evaluated on the same images.
        pictures: of images, with ground truth and the predictions of each run.

    Raises:
        OSError: disk full or no permission; an existing file is left unchanged.
    """
    title = " and ".join(facts.name for facts in runs)
    subtitle = "; ".join(
        headline(facts.summary) if len(runs) == 1 else f"{facts.name}: {headline(facts.summary)}" for facts in runs
    )
    found = [facts for facts in runs if facts.findings]
    texts = [f"{'' if len(runs) == 1 else f'{facts.name}: '}{facts.findings[0].what}" for facts in found]
    first = f"What to fix first: {' '.join(texts)}" if texts else ""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write(render(title, subtitle, sections(runs, pictures), first=first).encode("utf-8", errors="replace"))


def write_page(path: str | Path, evaluated: Sequence[Evaluated], runs: Sequence[RunFacts]) -> None:
    """`write_report` with pictures: `evaluated` and `runs` are of the same models."""
    write_report(path, runs, draw_pictures(evaluated, runs, choose_images(runs)))


def require_comparable(runs: Sequence[RunFacts]) -> None:
    """Check that two runs were evaluated on the same classes and instances.

    Raises:
        InputError: they were not.
    """
    if len(runs) == 2 and (runs[0].names, runs[0].evaluated) != (runs[1].names, runs[1].evaluated):
        raise InputError(
            f"{runs[0].name} and {runs[1].name} are evaluated on different classes or annotations, so their figures "
            "cannot be compared; name one file for both with --val-annotations and --val-images, or the classes with "
            "--set data.classes=[A,B]"
        )


def report_values(facts: RunFacts) -> dict[str, Any]:
    """What a page says about a run, as values for JSON; figures are fractions of 1."""
    return {
        "name": facts.name,
        "figures": dict(facts.summary),
        "ceiling": None if facts.ceiling is None else {k: v for k, v in facts.ceiling.items() if k != "per_class"},
        "findings": [finding._asdict() for finding in facts.findings],
        "speed": dict(facts.speed),
        "environment": dict(facts.environment),
    }
