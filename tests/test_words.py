"""The words of the house: one spelling, one notation for shapes, no phrase that a native reader stumbles over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BANNED = {
    "British spelling": (
        r"colour|centre|neighbour|behaviour|grey\b|licence|(?:initial|optim|normal|recogn|serial)is(?:e|ed|ation)\b"
    ),
    "phrases": (
        r"\b(?:is|are) (?:said|told)\b|\banew\b|\bwhat hides\b|\bfor ever\b|\bpassed over\b|\bloading process|"
        r"\bdata sets?\b|\bgo on with\b|\bsomebody\b|\bmade up\b"
    ),
    "shapes": r"\b(?:u8|i32|i64|f16|f32|f64)\[",
}
FILES = [
    path
    for pattern in ("solov2/**/*.py", "docs/*", "examples/*", "configs/**/*.yaml", "*.md", "*.py", "*.toml")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in (".py", ".md", ".yaml", ".toml")
]


@pytest.mark.parametrize("kind", BANNED)
def test_banned_words(kind: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(BANNED[kind], line, re.IGNORECASE)
    ]
    assert len(FILES) > 100 and not found, "\n".join(found)
