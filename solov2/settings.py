"""Settings with their type, range and meaning beside each other, and the one place that holds a value against them."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import reprlib
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from solov2.errors import InputError

NOUNS = {  # one, several
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
    """A field of a `Settings` class; its annotation says the type, and the choices by `typing.Literal`.

    Args:
        default: its value where none is given.
        doc: its meaning, in one line.
        minimum, maximum, above, below: bounds of the number, or of each number in the list; the last two exclusive.
        length: of the list.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below, "length": length}
    return dataclasses.field(default=default, metadata={"doc": doc, **limits})


@dataclass(frozen=True)
class Rule:
    """What a setting takes: its annotated type and the limits of `setting`."""

    kind: Any
    doc: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    length: int | None = None

    @property
    def words(self) -> str:
        """What it takes, in the words of someone who writes YAML: 'an integer of at least 1'."""
        if typing.get_origin(self.kind) is Literal:
            return f"one of {', '.join(typing.get_args(self.kind))}"
        limits = {"of at least": self.minimum, "above": self.above, "at most": self.maximum, "below": self.below}
        bounds = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        if self.minimum is not None and self.maximum is not None:
            bounds = f"from {self.minimum} to {self.maximum}"
        noun = _noun(self.kind, self.length)
        if self.maximum is None and self.below is None:  # otherwise it goes without saying
            noun = noun.replace("number", "finite number")
        separator = ", each " if typing.get_origin(self.kind) is tuple else " "
        return f"{noun}{separator}{bounds}" if bounds else noun

    def check(self, value: Any, name: str) -> Any:
        """`value` as the annotated type: a list as a tuple, an integer or '1e-4' (text in YAML 1.1) as a number.

        Raises:
            InputError: it is of another type or out of range; the sentence calls it `name`.
        """
        try:
            return self._fit(value, self.kind, self.length)
        except (ValueError, OverflowError) as error:
            raise refusal(name, self.words, value) from error

    def _fit(self, value: Any, kind: Any, length: int | None = None) -> Any:
        origin, parts = typing.get_origin(kind), typing.get_args(kind)
        if origin is tuple and isinstance(value, (list, tuple)):
            if parts[-1] is Ellipsis:
                parts = parts[:1] * (len(value) if length is None else length)
            return tuple(self._fit(item, part) for item, part in zip(value, parts, strict=True))
        if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return self._within(int(value))
        if kind is float and isinstance(value, (numbers.Real, str)) and not isinstance(value, bool):
            return self._within(float(value))
        if kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if kind is str and isinstance(value, str) and value and "\0" not in value:
            return value
        if kind is bool and type(value).__name__ in ("bool", "bool_"):  # numpy's too, which is not imported here
            return bool(value)
        if origin is Literal and value in parts:
            return value
        raise ValueError

    def _within(self, number: Any) -> Any:
        if (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        ):
            return number
        raise ValueError


def _noun(kind: Any, length: int | None = None, *, several: bool = False) -> str:
    if typing.get_origin(kind) is not tuple:
        return NOUNS[kind][several]
    parts = typing.get_args(kind)
    count = length if parts[-1] is Ellipsis else len(parts)
    return f"{'lists' if several else 'a list'} of {f'{count} ' if count else ''}{_noun(parts[0], several=True)}"


@functools.cache
def rules(cls: type[Settings]) -> dict[str, Rule]:
    """The rule of every field of a class, in their order."""
    kinds = typing.get_type_hints(cls)
    return {entry.name: Rule(kinds[entry.name], **entry.metadata) for entry in dataclasses.fields(cls)}


@dataclass(frozen=True)
class Settings:
    """Base of the sections of a configuration: an object exists only with values that its fields take.

    Raises:
        InputError: a value is of another type or out of range, or two contradict each other; the sentence names the
            setting, what it takes and the value.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, rule in rules(type(self)).items():  # type: ignore[arg-type]  # takes __hash__ for that of the class
            object.__setattr__(self, name, rule.check(getattr(self, name), f"{self.section}.{name}"))
        for name, wanted in self.contradictions():
            raise refusal(f"{self.section}.{name}", wanted, getattr(self, name))

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(setting, what it must be) of values that are right alone and wrong together."""
        return iter(())


class _Shown(reprlib.Repr):
    """Values as YAML has them, and only their beginning: a few anchors make a list that would be gigabytes of text."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 100, 200

    def repr_tuple(self, value: tuple[Any, ...], level: int) -> str:
        return self.repr_list(list(value), level)

    def repr_bool(self, value: bool, _level: int) -> str:
        return str(value).lower()

    def repr_NoneType(self, _value: None, _level: int) -> str:
        return "null"


def refusal(name: str, wanted: str, value: Any) -> InputError:
    """The error of a setting whose value is not what it must be."""
    return InputError(f"{name} must be {wanted}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value for a message, in one line."""
    return " ".join(_Shown().repr(value).split())


@dataclass(frozen=True)
class PostprocessSettings(Settings):
    """Thresholds and limits with which raw outputs become instances; the defaults are the reference's test settings."""

    section: ClassVar[str] = "model"

    area_thresholds: tuple[float, ...] = setting(
        (8, 8, 16, 32, 32),
        "one for each level: a mask needs more pixels than that at a quarter of the input size",
        minimum=0,
    )
    category_threshold: float = setting(0.1, "minimum category score before Matrix NMS", minimum=0, maximum=1)
    mask_threshold: float = setting(0.5, "a pixel is set where its probability is above it", minimum=0, maximum=1)
    max_candidates: int = setting(500, "candidates that enter Matrix NMS; 0: all", minimum=0)
    nms_kernel: Literal["gaussian", "linear"] = setting("gaussian", "how Matrix NMS decays overlapping instances")
    nms_sigma: float = setting(2.0, "strength of the gaussian kernel; 0: no decay", minimum=0)
    score_threshold: float = setting(0.05, "minimum final score of an instance", minimum=0, maximum=1)
    max_instances: int = setting(100, "instances per image; 0: all", minimum=0)
