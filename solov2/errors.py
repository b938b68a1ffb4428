"""The errors that a user sees, and helpers for the text of messages; every module may import this one."""

from __future__ import annotations

import re


class InputError(ValueError):
    """A user error, described in one sentence; the commands print it without a traceback."""


class RunFailed(RuntimeError):
    """A run that cannot continue for a reason other than a user error; described in one sentence."""


class OutOfMemory(RunFailed):
    """Memory ran out before anything was changed."""


def memory_shortage(error: BaseException) -> str | None:
    """The message for an out-of-memory error of the host or a device: "out of memory (tried to allocate 2 GiB)".

    None for any other error. torch has a type of its own only for some of these errors.
    """
    text = str(error)
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not known and not (isinstance(error, RuntimeError) and _SHORTAGE.search(text)):
        return None
    amount = re.search(r"tried to allocate ([\d.,]+ ?\w+)", text, re.IGNORECASE)
    return f"out of memory (tried to allocate {amount[1]})" if amount else "out of memory"


SAVE_TRAINING_MEMORY = "lower --batch-size (and raise --accumulate to match), or use --precision bf16"
_SHORTAGE = re.compile(r"out of memory|can't allocate memory|not enough memory|STATUS_ALLOC_FAILED")


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number and its noun: "1 image", "2 images"; `plural` if it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def printable(text: str, *, encoding: str | None = None) -> str:
    """Make text from a file safe for a terminal.

    Control characters become escape sequences, and so do invisible characters, those that change the direction of text,
    and those that `encoding` cannot represent (None: no encoding is checked).
    """
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe if encoding is None else safe.encode(encoding, "backslashreplace").decode(encoding)
