"""The sections of the page about a model of instances: figures, curves, errors, pictures, and what to mend first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from solov2.evaluation.coco import percent
from solov2.report.charts import Series, bar_chart, line_chart, matrix
from solov2.report.errors import KINDS, RECALLS, Errors
from solov2.report.page import Section, cards, paragraph, picture, table
from solov2.report.ranking import Finding
from solov2.report.scores import calibration, calibration_error, confusion, mean_precision, operating_points

MAX_CLASSES = 20  # of the table of confusions: those with most errors


@dataclass(frozen=True)
class RunFacts:
    """What a page shows of a run; every part but the figures may be missing.

    Attributes:
        name: of the run.
        summary: of the evaluation, with "per_class".
        errors: of its results.
        findings: ranked.
        names: category id -> name of the class.
        ceiling: the figures of the training targets.
        log: the rows of log.jsonl.
        instances: category id -> number of instances in training.
        pictures: (what it shows, the picture).
        speed: name -> text.
        configuration: YAML.
        environment: name -> text.
    """

    name: str
    summary: Mapping[str, Any]
    errors: Errors
    findings: Sequence[Finding]
    names: Mapping[int, str]
    ceiling: Mapping[str, float] | None = None
    log: Sequence[Mapping[str, Any]] = ()
    instances: Mapping[int, int] = field(default_factory=dict)
    pictures: Sequence[tuple[str, Image.Image]] = ()
    speed: Mapping[str, str] = field(default_factory=dict)
    configuration: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def sections(facts: RunFacts) -> list[Section]:
    """All sections that there is something for."""
    made = [
        Section("Figures", _figures(facts)),
        Section("Training", _training(facts)),
        Section("Classes", _classes(facts)),
        Section("Scores", _scores(facts)),
        Section("Confusion of classes", _confusion(facts)),
        Section("Errors", _errors(facts)),
        Section("Pictures", _pictures(facts)),
        Section("What to mend first", findings_list(facts.findings)),
        Section("Run", _run(facts)),
    ]
    return [section for section in made if section.body]


def _figures(facts: RunFacts) -> str:
    masks, boxes = facts.summary["segm"], facts.summary["bbox"]
    head, ceiling = ["", "mask", "box"], facts.ceiling or {}
    rows = [[name, percent(masks[name]), percent(boxes[name])] for name in masks]
    if ceiling:
        head.append("ceiling")
        rows = [[*row, percent(ceiling[row[0]]) if row[0] in ceiling else ""] for row in rows]
    note = "Average precision and recall in percent, as COCO defines them"
    return table(head, rows, caption=f"{note}; ceiling: masks of the training targets themselves" if ceiling else note)


def _training(facts: RunFacts) -> str:
    steps = [row for row in facts.log if row.get("kind") == "train"]
    evaluations = [row for row in facts.log if row.get("kind") == "evaluation"]
    charts = []
    names = sorted({key for row in steps for key in row if key.startswith("loss_")})
    losses = [Series(name.removeprefix("loss_"), *_points(steps, name)) for name in names]
    if steps:
        charts.append(("Loss", line_chart(losses, x_label="step", y_label="loss")))
        rate = Series("learning rate", *_points(steps, "learning_rate"))
        charts.append(("Learning rate", line_chart([rate], x_label="step", y_label="learning rate")))
    if evaluations:
        figures = [Series(name, *_points(evaluations, key, 100)) for name, key in
                   (("mask AP", "segm_AP"), ("mask AP50", "segm_AP50"), ("box AP", "bbox_AP"))]  # fmt: skip
        charts.append(("Validation", line_chart(figures, x_label="step", y_label="%", y_range=(0, 100))))
    return cards(charts) if charts else ""


def _points(rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1) -> tuple[list[float], list[float]]:
    pairs = [(row["step"], factor * row[key]) for row in rows if key in row and np.isfinite(row[key])]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _classes(facts: RunFacts) -> str:
    numbers = Counter(facts.errors.categories.values())
    per_class = facts.summary.get("per_class", {})
    head = ["class", "training", "validation", "mask AP", "box AP"]
    rows = []
    for (category, name), figures in zip(sorted(facts.names.items()), per_class.values(), strict=False):
        trained = f"{facts.instances[category]:,}" if category in facts.instances else ""
        rows.append((name, trained, f"{numbers[category]:,}", percent(figures["segm_AP"]), percent(figures["bbox_AP"])))
    return table(head, rows, caption="Instances and average precision in percent") if rows else ""


def _scores(facts: RunFacts) -> str:
    errors, points = facts.errors, operating_points(facts.errors)
    threshold, f1 = points.best()
    bins = calibration(errors)
    scores = list(points.scores[::-1])
    marks = [(threshold, f"F1 {100 * f1:.0f} % at {threshold:.2f}")]
    by_score = [Series(name, scores, list(100 * values[::-1])) for name, values in
                (("F1", points.f1), ("precision", points.precision), ("recall", points.recall))]  # fmt: skip
    recalls = Series("mean of the classes", list(100 * RECALLS), list(100 * mean_precision(errors)))
    reliable = [Series("right", [x.score for x in bins], [100 * x.right for x in bins]),
                Series("as the score says", [0, 1], [0, 100])]  # fmt: skip
    error = f"Scores and shares differ by {100 * calibration_error(bins):.1f} points in the mean."
    note = f"A threshold of {threshold:.2f} gives the best F1, {100 * f1:.1f} %, at an IoU of 0.5."
    percents = (0.0, 100.0)
    return paragraph(note) + cards(
        [
            ("By threshold", line_chart(by_score, x_label="score", y_label="%", y_range=percents, marks=marks)),
            (
                "Precision and recall",
                line_chart([recalls], x_label="recall, %", y_label="precision, %", y_range=percents),
            ),
            (
                "Calibration",
                line_chart(reliable, x_label="score", y_label="right, %", y_range=percents) + paragraph(error),
            ),
        ]
    )


def _confusion(facts: RunFacts) -> str:
    threshold, _ = operating_points(facts.errors).best()
    categories = sorted(facts.names)
    counts = confusion(facts.errors, categories, threshold)
    wrong = counts.sum(axis=1)[:-1] + counts.sum(axis=0)[:-1] - 2 * np.diag(counts)[:-1]
    shown = sorted(np.argsort(-wrong, kind="stable")[:MAX_CLASSES].tolist())
    names = [facts.names[categories[row]] for row in shown]
    rows, columns = [*names, "background"], [*names, "missed"]
    places = [*shown, len(categories)]
    title = f"Rows: annotated, columns: predicted, with scores of at least {threshold:.2f}"
    if len(categories) > MAX_CLASSES:
        title += f"; the {MAX_CLASSES} classes with most errors"
    return matrix(rows, columns, counts[np.ix_(places, places)], title=title)


def _errors(facts: RunFacts) -> str:
    counts, gains = facts.errors.counts(), facts.errors.gains
    rows = [(kind, max(0.0, 100 * gains[kind]), f"{100 * gains[kind]:.1f} ({counts[kind]:,})") for kind in KINDS]
    note = "Points of AP50 that each kind of error costs (and their number), as TIDE defines them. They do not add up."
    if facts.ceiling:
        lost = 100 * (1 - facts.ceiling["AP50"])
        rows.append(("ceiling", lost, f"{lost:.1f}"))
        note += " Ceiling: what the training targets lose at this resolution and with these grids."
    return paragraph(note) + bar_chart(rows, title="AP50 lost by kind of error")


def _pictures(facts: RunFacts) -> str:
    return cards((text, picture(image, text)) for text, image in facts.pictures) if facts.pictures else ""


def findings_list(findings: Sequence[Finding]) -> str:
    """The ranked list."""
    if not findings:
        return paragraph("No loss is larger than half a point of AP50.")
    lines = "".join(
        f'<li><span class="gain">{100 * x.gain:.1f} points</span> <span class="area">{escape(x.area)}</span> '
        f"{escape(x.what)}<br>{escape(x.remedy)}</li>"
        for x in findings
    )
    return f'<ol class="findings">{lines}</ol>'


def _run(facts: RunFacts) -> str:
    parts = [table(("", ""), facts.speed.items(), caption="Speed and memory")] if facts.speed else []
    if facts.environment:
        parts.append(table(("", ""), facts.environment.items(), caption="Environment"))
    if facts.configuration:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(facts.configuration)}</pre></details>")
    return "".join(parts)
