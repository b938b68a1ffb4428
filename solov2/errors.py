"""What a command says and how it ends: a user's mistake is one sentence on stderr and exit code 2, no traceback."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Sequence

import torch

from solov2 import distributed
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
    others = set(multiprocessing.active_children())
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
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
    finally:
        kill_children(but=others)


def kill_children(but: Collection[multiprocessing.Process] = ()) -> None:
    """End the processes that this one has started, except some; for the main thread.

    Loading processes pass over a first SIGTERM (`data.loader`), so that Python would wait for them for ever when it
    ends, and those that hang hear none. torch's own handler would call their end an error.
    """
    children = [process for process in multiprocessing.active_children() if process not in but]
    if not children:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for process in children:
            process.kill()
        for process in children:
            process.join(1)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _print_warning(message: Warning | str, *_details: object) -> None:
    """Once for all processes; what a loading process says, of the images it has, is said by each."""
    if distributed.launched_rank() == 0 or torch.utils.data.get_worker_info() is not None:
        text = "\n".join(printable(line) for line in str(message).splitlines())
        print(f"warning: {text}", file=sys.stderr)


def sentence(error: BaseException) -> str:
    """The message alone; a loader process hands its errors on with the traceback in front of it."""
    text = str(error)
    marker = f"{type(error).__name__}: "
    return printable(text.rsplit(marker, 1)[-1].strip() if "Original Traceback" in text else text)


def printable(text: str) -> str:
    """Text from a file, made safe for a terminal: control characters are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
