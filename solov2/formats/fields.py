"""Fields of parsed JSON: what is missing or of a wrong type is one sentence that names the file and the entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solov2.data.annotations import all_finite
from solov2.errors import InputError


def entry(value: Any, where: str) -> dict[str, Any]:
    """`value` if it is an object. Raises InputError if not."""
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, not {str(value)[:80]!r}")
    return value


def entries(parent: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """The objects in the list `key`. Raises InputError if it is missing, or holds anything else."""
    found = parent.get(key)
    if not isinstance(found, list):
        raise InputError(f"{where} has no list `{key}`")
    return [entry(value, f"{where}, entry {number} of `{key}`,") for number, value in enumerate(found, start=1)]


def text(parent: Mapping[str, Any], key: str, where: str) -> str:
    """The text `key`; a number counts. Raises InputError if it is missing or empty."""
    value = parent.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} has no text `{key}`")
    return value


def numbers(parent: Mapping[str, Any], where: str, *keys: str) -> list[float]:
    """The finite numbers under the keys. Raises InputError if one is missing."""
    for key in keys:
        if not all_finite([parent.get(key)]):
            raise InputError(f"{where} has no number `{key}`")
    return [float(parent[key]) for key in keys]


def size_of(parent: Mapping[str, Any], height: str, width: str) -> tuple[int, int] | None:
    """(h, w) under two keys, None if they are not two numbers."""
    sides = [parent.get(height), parent.get(width)]
    return (int(sides[0]), int(sides[1])) if all_finite(sides) and all(sides) else None  # type: ignore[arg-type]


def flat_points(points: Any, where: str) -> list[float]:
    """[[x, y], ...] as x, y, ... Raises InputError if it is not a list of pairs of finite numbers."""
    pairs = isinstance(points, list) and all(isinstance(x, list) and len(x) == 2 and all_finite(x) for x in points)
    if not pairs:
        raise InputError(f"{where}: the points must be a list of pairs of numbers, [x, y]")
    return [float(value) for point in points for value in point]


def class_names(names: Any, where: str) -> list[str]:
    """A list of names, or an object {number or text: name} in the order of its numbers, as a list of text.

    Raises:
        InputError: it is neither, it is empty, or a name occurs twice.
    """
    if isinstance(names, dict):
        try:
            numbered = {int(key): name for key, name in names.items()}
        except (TypeError, ValueError):
            raise InputError(f"{where} must number the class names") from None
        if sorted(numbered) != list(range(len(names))):
            raise InputError(f"{where} must number the class names from 0, without gaps")
        names = [numbered[number] for number in range(len(numbered))]
    if not isinstance(names, list) or not names or not all(isinstance(x, (str, int, float)) and str(x) for x in names):
        raise InputError(f"{where} must be a list of class names")
    found = [str(name).strip() for name in names]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{where} has the class name {twice} twice")
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8. Raises InputError if it is none, or missing."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not text in UTF-8") from error
