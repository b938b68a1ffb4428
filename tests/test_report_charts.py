"""Charts and tables: texts stay inside the picture and readable, also without backgrounds, as on paper."""

from __future__ import annotations

import re

import numpy as np
import pytest

from solov2.report.charts import WIDTH, Series, line_chart, matrix
from solov2.report.page import STYLE


@pytest.mark.parametrize("x", [0.02, 0.5, 0.98])
def test_the_text_of_a_mark_stays_inside(x: float) -> None:
    chart = line_chart([Series("F1", [0, 1], [0, 1])], x_label="score", y_label="%", marks=[(x, "F1 87 % at 0.98")] * 2)
    marks = re.findall(r'<text class="tick( end)?" x="([\d.]+)" y="([\d.]+)">F1', chart)
    assert len(marks) == 2 and marks[0][2] != marks[1][2]
    for end, left, _ in marks:
        assert 110 < float(left) if end else float(left) < WIDTH - 110


def luminance(color: tuple[float, ...]) -> float:
    """Of WCAG 2, of sRGB from 0 to 1."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_of_a_matrix_are_readable(dark: bool) -> None:
    """Contrast of 4.5 at least, as WCAG asks, on the darkest cell; and no cell has a color of text of its own."""
    part = STYLE.split("prefers-color-scheme: dark")[dark]
    colors = {}
    for name, value in re.findall(r"--(ink|paper|card|bar): #(\w+)", part):
        digits = value if len(value) == 6 else "".join(2 * digit for digit in value)
        colors[name] = tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    found = re.search(r"var\(--share\) \* (\d+)%", STYLE)
    assert found is not None
    share = int(found[1]) / 100
    for ground in ("paper", "card"):
        mixed = tuple(share * bar + (1 - share) * under for bar, under in zip(colors["bar"], colors[ground]))
        low, high = sorted((luminance(colors["ink"]), luminance(mixed)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    table = matrix(["a", "b"], ["a", "b"], np.array([[9, 1], [0, 0]]), title="t")
    assert "class=" not in table.split("<tbody>")[1] and "nan" not in table
