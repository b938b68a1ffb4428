"""The sections of a page, of one run or of two side by side; what they show of panoptic models is in
`solov2.report.panoptic_content`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import yaml

from solov2.config import changed_settings
from solov2.evaluation.coco import TITLES as KIND_TITLES
from solov2.evaluation.coco import percent
from solov2.report.charts import Series, bar_chart, line_chart, matrix
from solov2.report.errors import KINDS, RECALLS, Errors
from solov2.report.facts import Picture, RunFacts
from solov2.report.page import Section, cards, paragraph, table, views
from solov2.report.panoptic_content import class_rows, confusion_tables, figure_table, loss_chart
from solov2.report.panoptic_errors import PanopticErrors
from solov2.report.ranking import Finding
from solov2.report.run_files import is_number
from solov2.report.scores import calibration, calibration_error, confusion, mean_precision, operating_points

MAX_CLASSES = 20  # of a table of confusions: those with most errors
PERCENTS = (0.0, 100.0)
VALIDATION = (
    ("mask AP", "segm_AP"), ("mask AP50", "segm_AP50"), ("box AP", "bbox_AP"), ("PQ", "all_pq"),
    ("PQ of things", "things_pq"), ("PQ of stuff", "stuff_pq"),
)  # fmt: skip


def sections(runs: Sequence[RunFacts], pictures: Sequence[Picture]) -> list[Section]:
    """All sections that there is something for.

    Args:
        runs: one, or two that were evaluated on the same images.
        pictures: of images, with ground truth and the predictions of each run.
    """
    panoptic = isinstance(runs[0].errors, PanopticErrors)
    made = [
        Section("Figures", figure_table(runs) if panoptic else _figures(runs)),
        Section("Training", _training(runs)),
        Section("Classes", _classes(runs)),
        Section("Scores", "" if panoptic else _scores(runs)),
        Section("Confusion", each(runs, confusion_tables if panoptic else _confusion)),
        Section("Errors", each(runs, loss_chart if panoptic else _errors)),
        Section("Pictures", _pictures(pictures)),
        Section("Run", _run(runs)),
        Section("What to fix first", each(runs, _findings)),
    ]
    return [section for section in made if section.body]


def each(runs: Sequence[RunFacts], part: Callable[[RunFacts], str]) -> str:
    """A part of the page for each run, side by side if there are two."""
    bodies = [part(facts) for facts in runs]
    return bodies[0] if len(runs) == 1 else cards((facts.name, body) for facts, body in zip(runs, bodies) if body)


def _name(facts: RunFacts, what: str, runs: Sequence[RunFacts]) -> str:
    """The name of a series: what it shows, and of which run if there are two."""
    return what if len(runs) == 1 else f"{facts.name}: {what}"


def _figures(runs: Sequence[RunFacts]) -> str:
    head, columns = [""], list[list[float]]()
    figures = [*runs[0].summary["segm"]]
    for kind, title in KIND_TITLES.items():
        values = [[facts.summary[kind].get(x, -1.0) for x in figures] for facts in runs if kind in facts.summary]
        head += [_name(facts, title, runs) for facts in runs if kind in facts.summary]
        columns += values
    limits = [facts for facts in runs if facts.ceiling]
    head += [_name(facts, "mask ceiling", runs) for facts in limits]
    columns += [[facts.ceiling["segm"].get(x, -1.0) for x in figures] for facts in limits if facts.ceiling]
    rows = [[name, *map(percent, values)] for name, *values in zip(figures, *columns, strict=True)]
    if len(runs) == 2:
        head.append("change of mask")
        for row, before, now in zip(rows, *columns[:2], strict=True):
            row.append("-" if min(before, now) < 0 else f"{100 * (now - before):+.1f}")
    note = "Average precision and recall in percent, as COCO defines them"
    shown = table(head, rows, caption=f"{note}; ceiling: what the training targets reach" if limits else note)
    if "lvis" in runs[0].summary:  # from eval, which reports one run
        shown += _lvis(runs[0].summary["lvis"])
    missing = "boundary" not in runs[0].summary
    return shown + (paragraph("Boundary AP needs faster-coco-eval: pip install 'solov2[report]'") if missing else "")


def _lvis(figures: Mapping[str, Any]) -> str:
    kinds = [kind for kind in KIND_TITLES if kind in figures]
    rows = [[name, *(percent(figures[kind][name]) for kind in kinds)] for name in figures["segm"]]
    return table(["", *(KIND_TITLES[kind] for kind in kinds)], rows, caption="The same by the rules of LVIS")


def _training(runs: Sequence[RunFacts]) -> str:
    steps = [[row for row in facts.log if row.get("kind") == "train"] for facts in runs]
    evaluations = [[row for row in facts.log if row.get("kind") == "evaluation"] for facts in runs]
    charts = []
    if any(steps):
        keys = sorted({key for rows in steps for row in rows for key in row if key.startswith("loss")})
        keys = [key for key in keys if len(runs) == 1 or key == "loss"]
        losses = [
            Series(_name(facts, key.removeprefix("loss_"), runs), *_points(rows, key))
            for facts, rows in zip(runs, steps)
            for key in keys
        ]
        rates = [
            Series(_name(facts, "learning rate", runs), *_points(rows, "learning_rate"))
            for facts, rows in zip(runs, steps)
        ]
        charts.append(("Loss", line_chart(losses, x_label="step", y_label="loss")))
        charts.append(("Learning rate", line_chart(rates, x_label="step", y_label="learning rate")))
    if any(evaluations):
        figures = [
            Series(_name(facts, name, runs), *_points(rows, key, 100))
            for facts, rows in zip(runs, evaluations)
            for name, key in (VALIDATION if len(runs) == 1 else (VALIDATION[0], VALIDATION[3]))
        ]
        charts.append(("Validation", line_chart(figures, x_label="step", y_label="%", y_range=PERCENTS)))
    return cards(charts) if charts else ""


def _points(rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1) -> tuple[list[float], list[float]]:
    """Steps and values of a key; a run that was resumed repeats steps, of which the last ones count."""
    pairs: list[tuple[float, float]] = []
    for step, value in ((row.get("step"), row.get(key)) for row in rows):
        if is_number(step) and is_number(value):
            while pairs and pairs[-1][0] >= step:
                pairs.pop()
            pairs.append((step, factor * value))
    return [x for x, _ in pairs], [y for _, y in pairs]


def _classes(runs: Sequence[RunFacts]) -> str:
    panoptic = isinstance(runs[0].errors, PanopticErrors)
    head = ["class", "in training", "evaluated"]
    columns = [class_rows(facts) if panoptic else _class_rows(facts) for facts in runs]
    for facts, (titles, _) in zip(runs, columns):
        head += [_name(facts, title, runs) for title in titles]
    rows = []
    for category, name in runs[0].names.items():
        counts = [f"{numbers[category]:,}" if numbers else "" for numbers in (runs[0].trained, runs[0].evaluated)]
        rows.append([name, *counts, *(text for _, cells in columns for text in cells.get(name, ()))])
    noun = "Segments and panoptic quality" if panoptic else "Instances and average precision"
    return table(head, rows, caption=f"{noun} (percent)") if rows else ""


def _class_rows(facts: RunFacts) -> tuple[list[str], dict[str, list[str]]]:
    """(titles, name of a class -> cells)."""
    per_class = facts.summary.get("per_class", {})
    return ["mask AP", "box AP"], {
        name: [percent(own["segm_AP"]), percent(own["bbox_AP"])] for name, own in per_class.items()
    }


def _scores(runs: Sequence[RunFacts]) -> str:
    parts, curves, marks, precisions, reliable = [], [], [], [], []
    for facts in runs:
        errors = facts.errors
        assert isinstance(errors, Errors)
        points, bins = operating_points(errors), calibration(errors)
        threshold, f1 = points.best()
        text = f"A threshold of {threshold:.2f} gives the best F1, {100 * f1:.1f} %, at an IoU of 0.5. Scores are on "
        text += f"average {100 * calibration_error(bins):.1f} points away from the share of predictions that are right."
        if f1 > 0:
            marks.append((threshold, f"F1 {100 * f1:.0f} % at {threshold:.2f}"))
        else:
            text = "No prediction is right at an IoU of 0.5, so no threshold is better than another."
        parts.append(paragraph(_name(facts, text, runs)))
        shown = {"F1": points.f1, "precision": points.precision, "recall": points.recall}
        curves += [
            Series(_name(facts, what, runs), list(points.scores[::-1]), list(100 * values[::-1]))
            for what, values in shown.items()
            if len(runs) == 1 or what == "F1"
        ]
        precisions.append(
            Series(_name(facts, "mean of the classes", runs), list(100 * RECALLS), list(100 * mean_precision(errors)))
        )
        reliable.append(Series(_name(facts, "right", runs), [x.score for x in bins], [100 * x.right for x in bins]))
    reliable.append(Series("as the score says", [0, 1], [0, 100]))
    charts = [
        ("By threshold", line_chart(curves, x_label="score", y_label="%", y_range=PERCENTS, marks=marks)),
        ("Precision and recall at an IoU of 0.5",
         line_chart(precisions, x_label="recall, %", y_label="precision, %", y_range=PERCENTS)),
        ("Calibration", line_chart(reliable, x_label="score", y_label="right, %", y_range=PERCENTS)),
    ]  # fmt: skip
    return "".join(parts) + cards(charts)


def _confusion(facts: RunFacts) -> str:
    assert isinstance(facts.errors, Errors)
    threshold, _ = operating_points(facts.errors).best()
    categories = sorted(facts.names)
    counts = confusion(facts.errors, categories, threshold)
    wrong = counts.sum(axis=1)[:-1] + counts.sum(axis=0)[:-1] - 2 * np.diag(counts)[:-1]
    shown = sorted(np.argsort(-wrong, kind="stable")[:MAX_CLASSES].tolist())
    names = [facts.names[categories[row]] for row in shown]
    places = [*shown, len(categories)]
    text = f"Rows: annotated as; columns: predicted as, with scores of at least {threshold:.2f}"
    if len(shown) < len(categories):
        text += f"; the {len(shown)} classes with most errors"
    return matrix([*names, "background"], [*names, "missed"], counts[np.ix_(places, places)], title=text)


def _errors(facts: RunFacts) -> str:
    assert isinstance(facts.errors, Errors)
    counts, gains = facts.errors.counts(), facts.errors.gains
    rows = [(kind, max(0.0, 100 * gains[kind]), f"{100 * gains[kind]:.1f} ({counts[kind]:,})") for kind in KINDS]
    note = "Points of AP50 that each kind of error costs (and their number), as TIDE defines them. They do not add up."
    limit = (facts.ceiling or {}).get("segm", {}).get("AP50", -1)
    if limit >= 0:
        lost = 100 * (1 - limit)
        rows.append(("training targets", lost, f"{lost:.1f}"))
        note += " Training targets: what they lose themselves, at this resolution and with these grids."
    return paragraph(note) + bar_chart(rows, title="AP50 lost by kind of error")


def _pictures(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    note = "Matching objects have the same color; an object without a match has its own. Quality is that of PQ: "
    note += "the sum of the IoU of all matches, divided by their number plus half the number of what matches nothing."
    return paragraph(note) + "".join(
        f"<h3>{escape(shown.text)}</h3>{views(shown.views, shown.text)}" for shown in pictures
    )


def _findings(facts: RunFacts) -> str:
    if not sum(facts.evaluated.values()):
        return paragraph("No annotation counts in this evaluation, so there are no losses to rank.")
    return findings_list(facts.findings, "PQ" if isinstance(facts.errors, PanopticErrors) else "AP50")


def findings_list(findings: Sequence[Finding], figure: str = "AP50") -> str:
    """The ranked list; gains are points of `figure`."""
    if not findings:
        return paragraph(f"No loss is larger than half a point of {figure}.")
    lines = "".join(
        f'<li><span class="gain">{100 * x.gain:.1f} points of {figure}</span> '
        f'<span class="area">{escape(x.area)}</span> {escape(x.what)}<br>{escape(x.remedy)}</li>'
        for x in findings
    )
    return f'<ol class="findings">{lines}</ol>'


def _run(runs: Sequence[RunFacts]) -> str:
    parts = [each(runs, _facts)]
    if len(runs) == 2 and runs[0].config and runs[1].config:
        before, now = (facts.config.to_dict() for facts in runs if facts.config)
        changes = changed_settings(before, now)
        parts.insert(0, "<h3>Settings that differ</h3>" + ("".join(map(paragraph, changes)) or paragraph("None.")))
    for facts in runs:
        if facts.config is not None:
            text = escape(yaml.safe_dump(facts.config.to_dict(), sort_keys=False))
            title = escape(_name(facts, "configuration", runs).capitalize())
            parts.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _facts(facts: RunFacts) -> str:
    parts = [table(("", ""), facts.speed.items(), caption="Speed and memory")] if facts.speed else []
    if facts.environment:
        parts.append(table(("", ""), facts.environment.items(), caption="Environment"))
    return "".join(parts)
