"""What a page shows of a panoptic model: qualities, losses of PQ, and the confusion of stuff and of segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from solov2.evaluation.panoptic import GROUPS, percent
from solov2.report.charts import bar_chart, matrix
from solov2.report.facts import RunFacts
from solov2.report.page import paragraph, table
from solov2.report.panoptic_errors import PanopticErrors, stuff_confusion

MAX_PAIRS = 10


def figure_table(runs: Sequence[RunFacts]) -> str:
    """PQ, SQ and RQ of all classes, things and stuff, and the PQ of the training targets; of two runs, the change."""
    limits = [facts.ceiling for facts in runs if facts.ceiling]
    head = [""]
    for facts in runs:
        head += ["PQ", "SQ", "RQ"] if len(runs) == 1 else [f"{facts.name}: {figure}" for figure in ("PQ", "SQ", "RQ")]
    head += ["PQ ceiling" if len(runs) == 1 else f"{facts.name}: PQ ceiling" for facts in runs if facts.ceiling]
    head += ["change of PQ"] if len(runs) == 2 else []
    rows = []
    for group in GROUPS:
        row = [group, *(percent(facts.summary[group][figure]) for facts in runs for figure in ("pq", "sq", "rq"))]
        row += [percent(ceiling[group]["pq"]) for ceiling in limits]
        if len(runs) == 2:
            before, now = (facts.summary[group]["pq"] for facts in runs)
            row.append("-" if None in (before, now) else f"{100 * (now - before):+.1f}")
        rows.append(row)
    note = "Panoptic quality in percent"
    return table(head, rows, caption=f"{note}; ceiling: what the training targets reach" if limits else note)


def class_rows(facts: RunFacts) -> tuple[list[str], dict[str, list[str]]]:
    """Titles, and name of a class -> cells: PQ, SQ, RQ, and the numbers of matches and errors."""
    cells = {
        name: [percent(own["pq"]), percent(own["sq"]), percent(own["rq"]), *(f"{own[x]:,}" for x in ("tp", "fp", "fn"))]
        for name, own in facts.summary.get("per_class", {}).items()
    }
    return ["PQ", "SQ", "RQ", "matched", "wrong", "missed"], cells


def confusion_tables(facts: RunFacts) -> str:
    """Where the pixels of stuff go, and which segments are found as another class."""
    errors = facts.errors
    assert isinstance(errors, PanopticErrors)
    names = [facts.names[category] for category in errors.stuff]
    counts = stuff_confusion(errors)
    shares = (1000 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).round().astype(np.int64)
    title = "Pixels of stuff, per thousand. Rows: annotated as; columns: predicted as"
    stuff = matrix(names, [*names, "things", "nothing"], shares, title=title) if names else ""
    mistaken = Counter({pair: len(ious) for pair, ious in errors.confusion.mistaken.items()}).most_common(MAX_PAIRS)
    if not mistaken:
        return stuff + paragraph("No segment is found as another class.")
    rows = [(facts.names[true], facts.names[said], f"{number:,}") for (true, said), number in mistaken]
    return stuff + table(("annotated as", "predicted as", "segments"), rows, caption="Segments of the wrong class")


def loss_chart(facts: RunFacts) -> str:
    """Points of PQ that each kind of error costs."""
    errors = facts.errors
    assert isinstance(errors, PanopticErrors)
    rows = [
        (f"{loss.kind}, {loss.group}", max(0.0, 100 * loss.gain), f"{100 * loss.gain:.1f} ({loss.number:,})")
        for loss in errors.losses
    ]
    note = "Points of PQ that each kind of error costs (and their number). They do not add up."
    limit = (facts.ceiling or {}).get("all", {}).get("pq")
    if limit is not None:
        rows.append(("training targets", 100 * (1 - limit), f"{100 * (1 - limit):.1f}"))
        note += " Training targets: what they lose themselves, at this resolution and with these grids."
    return paragraph(note) + bar_chart(rows, title="PQ lost by kind of error")
