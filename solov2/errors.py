"""What every module may import: the two errors that a user sees, and helpers for the text of messages."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake, described in one sentence; the commands print it without a traceback."""


class RunFailed(RuntimeError):
    """A run that cannot continue, through no fault of its user; described in one sentence."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number and its noun: "1 image", "2 images"; `plural` where it takes more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def printable(text: str, *, encoding: str | None = None) -> str:
    """Make text from a file safe for a terminal.

    Control characters become escape sequences, as do invisible ones, those that change the direction of text, and all
    that `encoding` lacks (None: it has all).
    """
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe if encoding is None else safe.encode(encoding, "backslashreplace").decode(encoding)
