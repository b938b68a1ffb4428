"""Charts as inline SVG: they need no script, take their colors from the page's style, and scale with its width.

Series differ by color (of Okabe and Ito's palette, which the color-blind can tell apart) and by dashes. Every text is
escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 440, 250  # narrow, so that texts stay readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 14, 44  # margins
DASHES = ("", "7 4", "2 3", "9 3 2 3", "5 5", "1 4")
TICKS = 5
MAX_POINTS = 400  # of a series; more cannot be seen at this width
MAX_DOTS = 30  # points of a series that are drawn one by one
_Place = Callable[[float, float], tuple[float, float]]  # value -> position in the picture


class Series(NamedTuple):
    """A line of a chart: points in the order of x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines over common axes, with a legend if there are several.

    Args:
        series: without points that are not finite.
        x_label, y_label: of the axes.
        y_range: (lowest, highest) of the axis; None: of the values.
        marks: (x, text) of vertical lines.
    """
    series = [_thinned(entry) for entry in series if len(entry.x)]
    if not series:
        return '<p class="empty">No values.</p>'
    x_low, x_high = _bounds([value for entry in series for value in entry.x])
    y_low, y_high = y_range or _bounds([value for entry in series for value in entry.y])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (min(max(y, y_low), y_high) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    parts = [_axes((x_low, x_high), (y_low, y_high), x_label, y_label, place)]
    for number, (x, text) in enumerate(marks):
        left, bottom = place(x, y_low)
        at, side = (left + 4, "") if left < WIDTH / 2 else (left - 4, " end")  # towards the middle, where there is room
        parts.append(
            f'<line class="mark" x1="{left:.1f}" y1="{TOP}" x2="{left:.1f}" y2="{bottom:.1f}"/>'
            f'<text class="tick{side}" x="{at:.1f}" y="{bottom - 6 - 14 * number:.1f}">{escape(text)}</text>'
        )
    for number, entry in enumerate(series):
        places = [place(x, y) for x, y in zip(entry.x, entry.y, strict=True)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        if len(places) <= MAX_DOTS:
            parts += [f'<circle class="dot c{number % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        parts.append(
            f'<polyline class="line c{number % 6}" stroke-dasharray="{DASHES[number % 6]}" points="{points}">'
            f"<title>{escape(entry.name)}</title></polyline>"
        )
    return _figure(parts, f"{y_label} by {x_label}", HEIGHT) + _legend([entry.name for entry in series])


def bar_chart(rows: Sequence[tuple[str, float, str]], *, title: str, high: float | None = None) -> str:
    """Horizontal bars, one below the other: (name, value of 0 or more, text beside the bar).

    `high` is the value of a bar of full length; None: the largest.
    """
    if not rows:
        return '<p class="empty">No values.</p>'
    full = high or max(value for _, value, _ in rows) or 1.0
    room, step = 156, 24
    parts = []
    for number, (name, value, text) in enumerate(rows):
        y, length = number * step, value / full * (WIDTH - room - 90)
        parts.append(
            f'<text class="name" x="{room - 8}" y="{y + 16}">{escape(_short(name))}<title>{escape(name)}</title></text>'
            f'<rect class="bar" x="{room}" y="{y + 4}" width="{max(length, 0.5):.1f}" height="16"/>'
            f'<text class="value" x="{room + length + 6:.1f}" y="{y + 16}">{escape(text)}</text>'
        )
    return _figure(parts, title, step * len(rows) + 4)


def matrix(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, *, title: str) -> str:
    """A table of counts int64 [rows, columns] whose cells are as dark as their share of the row."""
    sums = np.maximum(values.sum(axis=1, keepdims=True), 1)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for name, row, shares in zip(rows, values.tolist(), (values / sums).tolist(), strict=True):
        cells = "".join(f'<td style="--share:{share:.2f}">{value or ""}</td>' for value, share in zip(row, shares))
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="matrix"><caption>{escape(title)}</caption><thead><tr><td></td>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _thinned(series: Series) -> Series:
    """At most `MAX_POINTS` of the points, the first and the last among them."""
    count = len(series.x)
    if count <= MAX_POINTS:
        return series
    kept = np.unique(np.linspace(0, count - 1, MAX_POINTS).round().astype(int))
    return Series(series.name, [series.x[i] for i in kept], [series.y[i] for i in kept])


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - abs(low) / 2 - 0.5, high + abs(high) / 2 + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers inside an interval, about `TICKS` of them."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(
    x_bounds: tuple[float, float], y_bounds: tuple[float, float], x_label: str, y_label: str, place: _Place
) -> str:
    parts = []
    for value in _ticks(*y_bounds):
        _, y = place(x_bounds[0], value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{LEFT - 6}" y="{y + 4:.1f}">{value:.4g}</text>'
        )
    for value in _ticks(*x_bounds):
        x, _ = place(value, y_bounds[0])
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{value:.6g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label middle" x="{middle:.0f}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
    half = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label middle" transform="translate(14 {half:.0f}) rotate(-90)">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _figure(parts: Sequence[str], title: str, height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    entries = "".join(
        '<span><svg viewBox="0 0 28 8" class="key" aria-hidden="true">'
        f'<line class="line c{number % 6}" x1="0" y1="4" x2="28" y2="4" '
        f'stroke-dasharray="{DASHES[number % 6]}"/></svg>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{entries}</p>'


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"
