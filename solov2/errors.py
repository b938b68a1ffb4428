"""How a command ends: a user's mistake is one sentence on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from solov2.config import InputError


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake of its user, told in one sentence."""


def run_command(
    body: Callable[[Sequence[str]], int], arguments: Sequence[str] | None, *, interrupted: str = "interrupted"
) -> int:
    """Run a command and turn its expected failures into exit codes.

    Args:
        body: takes the arguments after the program name, returns the exit code.
        arguments: None for those of this process.
        interrupted: what Ctrl-C makes it say.

    Returns:
        The body's code; 2 for a user's mistake, a full disk or missing permission; 1 for a run that failed (a loss that
        is not finite, a process that is silent); 130 after Ctrl-C.
    """
    try:
        return body(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (FloatingPointError, ImportError, RunFailed, TimeoutError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    except (InputError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2


def sentence(error: BaseException) -> str:
    """The message alone; a loader process hands its errors on with the traceback in front of it."""
    text = str(error)
    marker = f"{type(error).__name__}: "
    return printable(text.rsplit(marker, 1)[-1].strip() if "Original Traceback" in text else text)


def printable(text: str) -> str:
    """Text from a file, made safe for a terminal: control characters are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
