"""The ground that every module may stand on: the two errors that a user sees, and text made safe for a terminal."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake, told in one sentence; the commands print it without a traceback."""


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake of its user, told in one sentence."""


def printable(text: str) -> str:
    """Text from a file, made safe for a terminal: control characters are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
