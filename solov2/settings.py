"""Declaring settings with their type, range and meaning, and checking values against them."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from solov2.errors import InputError

UNIONS = (types.UnionType, typing.Union)  # one type since Python 3.14
NOUNS = {  # singular, plural
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("non-empty text without NUL", "non-empty texts without NUL"),
}


def setting(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    length: int | None = None,
) -> Any:
    """A field of a `Settings` class. Its annotation is the type; `typing.Literal` lists the choices.

    `int | Literal["auto"]` accepts a number or a choice.

    Args:
        default: its default value.
        doc: its meaning, in one line.
        minimum, maximum, above, below: bounds of the number, or of each number in the list; the last two are exclusive.
        length: required length of the list.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below, "length": length}
    return dataclasses.field(default=default, metadata={"doc": doc, **limits})


@dataclass(frozen=True)
class Rule:
    """What a setting accepts: its annotated type and the limits passed to `setting`."""

    kind: Any
    doc: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    length: int | None = None

    @property
    def words(self) -> str:
        """What the setting accepts, in the terms of a YAML user: 'an integer of at least 1'."""
        if typing.get_origin(self.kind) is Literal:
            return f"one of {', '.join(typing.get_args(self.kind))}"
        if typing.get_origin(self.kind) in UNIONS:
            number, choice = typing.get_args(self.kind)
            return f"{dataclasses.replace(self, kind=number).words}, or {' or '.join(typing.get_args(choice))}"
        limits = {"of at least": self.minimum, "above": self.above, "at most": self.maximum, "below": self.below}
        bounds = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        if self.minimum is not None and self.maximum is not None:
            bounds = f"from {self.minimum} to {self.maximum}"
        noun = _noun(self.kind, self.length)
        if self.maximum is None and self.below is None:  # an upper bound already implies finite
            noun = noun.replace("number", "finite number")
        separator = ", each " if typing.get_origin(self.kind) is tuple else " "
        return f"{noun}{separator}{bounds}" if bounds else noun

    def check(self, value: Any, name: str) -> Any:
        """Convert `value` to the annotated type: a list to a tuple, an integer or '1e-4' (text in YAML 1.1) to a float.

        Raises:
            InputError: wrong type or out of range; the message calls the value `name`.
        """
        try:
            return self._convert(value, self.kind, self.length)
        except (ValueError, OverflowError) as error:
            raise invalid_value(name, self.words, value) from error

    def _convert(self, value: Any, kind: Any, length: int | None = None) -> Any:
        origin, parts = typing.get_origin(kind), typing.get_args(kind)
        if origin in UNIONS:
            kind = parts[1] if isinstance(value, str) else parts[0]
            origin, parts = typing.get_origin(kind), typing.get_args(kind)
        if origin is tuple and isinstance(value, (list, tuple)):
            if parts[-1] is Ellipsis:
                parts = parts[:1] * (len(value) if length is None else length)
            return tuple(self._convert(item, part) for item, part in zip(value, parts, strict=True))
        if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return self._in_range(int(value))
        if kind is float and isinstance(value, (numbers.Real, str)) and not isinstance(value, bool):
            return self._in_range(float(value))
        if kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if kind is str and isinstance(value, str) and value and "\0" not in value:
            return value
        if kind is bool and type(value).__name__ in ("bool", "bool_"):  # also numpy's bool, without importing numpy
            return bool(value)
        if origin is Literal and value in parts:
            return value
        raise ValueError

    def _in_range(self, number: Any) -> Any:
        if (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        ):
            return number
        raise ValueError


def _noun(kind: Any, length: int | None = None, *, plural: bool = False) -> str:
    if typing.get_origin(kind) is not tuple:
        return NOUNS[kind][plural]
    parts = typing.get_args(kind)
    count = length if parts[-1] is Ellipsis else len(parts)
    return f"{'lists' if plural else 'a list'} of {f'{count} ' if count else ''}{_noun(parts[0], plural=True)}"


@functools.cache
def rules(cls: type[Settings]) -> dict[str, Rule]:
    """The rule of each field of a class, in field order."""
    kinds = typing.get_type_hints(cls)
    return {entry.name: Rule(kinds[entry.name], **entry.metadata) for entry in dataclasses.fields(cls)}


@dataclass(frozen=True)
class Settings:
    """Base class of the sections of a configuration; the constructor validates every value.

    Raises:
        InputError: a value has the wrong type or is out of range, or two values contradict each other; the message
            names the setting, what it accepts and the value.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, rule in rules(type(self)).items():  # type: ignore[arg-type]  # mypy checks the instances' __hash__
            object.__setattr__(self, name, rule.check(getattr(self, name), f"{self.section}.{name}"))
        for name, wanted in self.contradictions():
            raise invalid_value(f"{self.section}.{name}", wanted, getattr(self, name))

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, what it must be) for values that are valid on their own but not together."""
        return iter(())


class _YamlRepr(reprlib.Repr):
    """Values in YAML spelling, truncated: a few YAML anchors can make a list that would print as gigabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 100, 200

    def repr_tuple(self, value: tuple[Any, ...], level: int) -> str:
        return self.repr_list(list(value), level)

    def repr_bool(self, value: bool, _level: int) -> str:
        return str(value).lower()

    def repr_NoneType(self, _value: None, _level: int) -> str:
        return "null"


def invalid_value(name: str, wanted: str, value: Any) -> InputError:
    """The error for a setting with an invalid value."""
    return InputError(f"{name} must be {wanted}, got {format_value(value)}")


def format_value(value: Any) -> str:
    """A value on one line, truncated, for a message."""
    return " ".join(_YamlRepr().repr(value).split())


@dataclass(frozen=True)
class PostprocessSettings(Settings):
    """Thresholds and limits for turning raw outputs into instances; the defaults are the reference's test settings."""

    section: ClassVar[str] = "model"

    area_thresholds: tuple[float, ...] = setting(
        (8, 8, 16, 32, 32),
        "one per pyramid level: a mask must have more pixels than this, at a quarter of the input size",
        minimum=0,
    )
    category_threshold: float = setting(0.1, "minimum category score before Matrix NMS", minimum=0, maximum=1)
    mask_threshold: float = setting(0.5, "pixels above this probability belong to the mask", minimum=0, maximum=1)
    max_candidates: int = setting(500, "maximum candidates that enter Matrix NMS; 0: no limit", minimum=0)
    nms_kernel: Literal["gaussian", "linear"] = setting("gaussian", "how Matrix NMS decays the scores of overlaps")
    nms_sigma: float = setting(2.0, "strength of the gaussian kernel; 0: no decay", minimum=0)
    score_threshold: float = setting(0.05, "minimum final score of an instance", minimum=0, maximum=1)
    max_instances: int = setting(100, "maximum instances per image; 0: no limit", minimum=0)


@dataclass(frozen=True)
class PanopticSettings(Settings):
    """Thresholds for merging instances and semantic labels; Panoptic FPN's, except for the score."""

    section: ClassVar[str] = "model"

    panoptic_score_threshold: float = setting(
        0.3, "panoptic models: minimum score of an instance that becomes a segment", minimum=0, maximum=1
    )
    panoptic_overlap_threshold: float = setting(
        0.5,
        "panoptic models: an instance that better ones cover by more than this share of its area is left out",
        minimum=0,
        maximum=1,
    )
    stuff_area_limit: int = setting(
        4096, "panoptic models: stuff with fewer pixels than this in the original image is left out", minimum=0
    )
