"""How a command ends: exit codes, and a user's mistake as one sentence on stderr without a traceback."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from solov2.data.watch import kill_children
from solov2.errors import InputError, RunFailed, printable

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def run_command(
    body: Callable[[Sequence[str]], int], arguments: Sequence[str] | None, *, interrupted: str = "interrupted"
) -> int:
    """Run a command and turn its expected failures into exit codes.

    Args:
        body: takes the arguments after the program name, returns the exit code.
        arguments: None for those of this process.
        interrupted: printed after Ctrl-C, unless the interruption itself says more.

    Returns:
        The body's code; 2 for a user's mistake, a full disk or missing permission; 1 for a run that failed (a loss that
        is not finite, a process that does not respond); 130 after Ctrl-C.

    Raises:
        KeyboardInterrupt: after Ctrl-C where `arguments` were given: a caller in Python wants to know.
    """
    others = set(multiprocessing.active_children())
    code = INTERRUPTED
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            code = body(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt as error:
        if _speaks():
            print(str(error) or interrupted, file=sys.stderr)
    except (ImportError, RunFailed, TimeoutError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        code = FAILED
    except (InputError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        code = MISTAKE
    finally:
        kill_children(but=others)
    if code == INTERRUPTED and arguments is not None:
        raise KeyboardInterrupt
    return code


def own_command(name: str) -> list[str]:
    """The words that start this command again, for processes of its own: its script, or the front door and `name`."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return ["-m", "solov2", name]
    return [sys.argv[0], name] if script.stem == "solov2" else [sys.argv[0]]


def _print_warning(message: Warning | str, *_details: object, **_named: object) -> None:
    """Rank 0 prints for all ranks; a loading process warns of its own images, so each of them prints."""
    if _speaks() or multiprocessing.parent_process() is not None:
        text = "\n".join(printable(line) for line in str(message).splitlines())
        print(f"warning: {text}", file=sys.stderr)


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def sentence(error: BaseException) -> str:
    """The message alone; a loading process passes its errors on with the traceback in front of the message."""
    text = str(error)
    marker = f"{type(error).__name__}: "
    return printable(text.rsplit(marker, 1)[-1].strip() if "Original Traceback" in text else text)
