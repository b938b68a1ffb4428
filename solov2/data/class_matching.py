"""Which class is which: a class is known by its name, not by its category id or its place in a file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from solov2.data.image_dataset import ImageDataset
from solov2.errors import InputError

LOG = logging.getLogger(__name__)
SHOWN = 10  # names in a message


def match_names(names: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """The index in `others` of each name, None if it is not there.

    Equal lists match one to one. Otherwise a name that occurs twice in a list matches nothing, because it does not say
    which of the two is meant.
    """
    if list(names) == list(others):
        return list(range(len(others)))
    unclear = repeated(names) | repeated(others)
    index = {name: i for i, name in enumerate(others) if name not in unclear}
    return [index.get(name) for name in names]


def can_match(names: Sequence[str] | None, others: Sequence[str]) -> bool:
    """Whether names identify classes: not if there are none, or only numbered ones ("class 0"), unknown to `others`."""
    if names is None:
        return False
    numbered = any(list(names) == [f"{kind} {i}" for i in range(len(names))] for kind in ("class", "stuff"))
    return not numbered or not set(names).isdisjoint(others)


def match_categories(class_names: Sequence[str], dataset: ImageDataset) -> list[int | None]:
    """The category id, in the annotation file of `dataset`, of each of a model's classes; None if the file lacks it."""
    return [None if i is None else dataset.category_ids[i] for i in match_names(class_names, dataset.class_names)]


def match_stuff(stuff_names: Sequence[str], dataset: ImageDataset) -> list[int | None]:
    """`match_categories` for the stuff of a panoptic model."""
    return [None if i is None else dataset.stuff_category_ids[i] for i in match_names(stuff_names, dataset.stuff_names)]


def check_categories(
    class_names: Sequence[str], dataset: ImageDataset, source: str, *, stuff_names: Sequence[str] = ()
) -> None:
    """Check before an evaluation that classes can be matched by name, and warn about those that only one side has.

    Args:
        class_names, stuff_names: of the model.
        dataset: to evaluate.
        source: what the names of the model come from, for messages.

    Raises:
        InputError: no class has the name of a category, or a shared name occurs twice.
    """
    figure = "PQ" if dataset.stuff_names else "AP"
    _check_names(class_names, dataset.class_names, dataset.annotation_file, source, figure)
    _check_names(stuff_names, dataset.stuff_names, dataset.annotation_file, source, figure)


def _check_names(known: Sequence[str], found: Sequence[str], file: Path, source: str, figure: str) -> None:
    if list(known) == list(found):
        return
    ambiguous = sorted((repeated(known) | repeated(found)) & set(known) & set(found))
    if ambiguous:
        raise InputError(
            f"classes are matched by name, but '{ambiguous[0]}' occurs twice in {file} or {source}; give its "
            "categories different names"
        )
    unknown, lacking = difference(found, known), difference(known, found)
    similar = similar_names(unknown, lacking)
    if set(found).isdisjoint(known):
        raise InputError(
            f"classes are matched by name, but no category of {file} ({shorten(found)}) has the name of a class of "
            f"{source} ({shorten(known)}){similar}; rename the categories"
        )
    parts = [f"{source} does not know {shorten(unknown)} ({figure} 0)"] if unknown else []
    parts += [f"{file} lacks {shorten(lacking)} (predictions dropped)"] if lacking else []
    if parts:
        LOG.warning("classes are matched by name: %s%s", " and ".join(parts), similar)


def difference(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The names that do not occur in `others`."""
    return [name for name in dict.fromkeys(names) if name not in others]


def similar_names(names: Sequence[str], others: Sequence[str]) -> str:
    """'; is 'A' the same as 'a'?' for names that differ only in case, spaces, - and _; empty if there are none."""
    index = {_simplify(other): other for other in others}
    pairs = [(name, index[_simplify(name)]) for name in names if _simplify(name) in index]
    return f"; {shorten([f'is {a!r} the same as {b!r}?' for a, b in pairs])}" if pairs else ""


def shorten(names: Sequence[str]) -> str:
    """Names for a message: the first ten, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def repeated(names: Sequence[str]) -> set[str]:
    """The names that occur more than once."""
    return {name for name, number in Counter(names).items() if number > 1}


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names as keys of a table: those that occur again become "name (2)", "name (3)", ..."""
    keys: dict[str, None] = {}
    for name in names:
        key, number = name, 1
        while key in keys or (number > 1 and key in names):
            number += 1
            key = f"{name} ({number})"
        keys[key] = None
    return list(keys)


def _simplify(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").split()).casefold()
