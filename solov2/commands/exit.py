"""How a command runs and ends: exit codes, and user errors as one line on stderr without a traceback."""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from solov2.commands.arguments import Parser
from solov2.data.watch import kill_children
from solov2.errors import InputError, RunFailed, printable

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit codes
HEAD_START, STAGGER = 3.0, 0.5  # seconds that ranks other than 0 wait before printing an error


def run_command(
    name: str,
    build_parser: Callable[[str], Parser],
    run: Callable[[argparse.Namespace], int],
    words: Sequence[str] | None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """Parse the arguments, run the command, and turn its expected failures into exit codes.

    Args:
        name: name of the command.
        build_parser: builds the parser, given the command as the user typed it.
        run: runs the command, given the parsed arguments (`args.words` has the raw ones); returns the exit code.
        words: the arguments; default: those of the process.
        interrupted: printed after Ctrl-C, unless the exception has its own message.

    Returns:
        The code of `run`; 2 for a user error, a full disk or missing permission; 1 for a failed run (a non-finite
        loss, a process that does not respond); 130 after Ctrl-C.

    Raises:
        KeyboardInterrupt: after Ctrl-C if `words` were given, so that a caller in Python learns of it.
        SystemExit: after --help.
    """
    earlier_children = set(multiprocessing.active_children())
    typed = list(sys.argv[1:] if words is None else words)
    code = INTERRUPTED
    try:
        with _reports_on_stderr():
            args = build_parser(typed_name(name)).parse_args(typed, argparse.Namespace(words=typed))
            code = run(args)
    except KeyboardInterrupt as error:
        if _is_rank_zero():
            print(str(error) or interrupted, file=sys.stderr)
    except (ImportError, RunFailed, TimeoutError) as error:
        _print_error(error)
        code = FAILED
    except (InputError, OSError) as error:
        _print_error(error)
        code = USER_ERROR
    finally:
        kill_children(exclude=earlier_children)
    if code == INTERRUPTED and words is not None:
        raise KeyboardInterrupt
    return code


def typed_name(name: str) -> str:
    """The command `name` as the user typed it: "train.py", "solov2 train", ..."""
    script = Path(sys.argv[0])
    if script.parts[-2:] == ("solov2", "__main__.py"):
        return f"python -m solov2 {name}"
    is_script = script.suffix == ".py" and script.stem != "__main__"  # our script or the user's
    return script.name if is_script or script.stem == f"solov2-{name}" else f"solov2 {name}"


def own_command(name: str) -> list[str]:
    """The arguments for Python that start the command `name` again, in other processes."""
    script = Path(sys.argv[0])
    if script.stem == "solov2":
        return [sys.argv[0], name]
    is_script = script.is_file() and script.stem != "__main__"  # run again in full: a user's script may do more
    return [sys.argv[0]] if is_script else ["-m", "solov2", name]


def _print_error(error: BaseException) -> None:
    """Print an error once, even if several ranks fail with the same one.

    A launcher ends all processes as soon as one has ended. So rank 0 prints immediately, and the others wait to be
    ended; a rank that is the only one to fail prints after the wait.
    """
    if not _is_rank_zero():
        time.sleep(HEAD_START + STAGGER * int(os.environ.get("LOCAL_RANK", 0)))
    print(f"error: {error_message(error)}", file=sys.stderr, flush=True)


class _Console(logging.Handler):
    """Prints what the library logs: warnings with that word in front, the rest as it is."""

    def emit(self, record: logging.LogRecord) -> None:
        _print_report(record.getMessage(), mark="warning: " if record.levelno >= logging.WARNING else "")


@contextlib.contextmanager
def _reports_on_stderr() -> Iterator[None]:
    """Print on stderr what the library logs (from INFO) and the warnings of Python and torch."""
    log, console = logging.getLogger("solov2"), _Console()
    level = log.level
    log.addHandler(console)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_details, **_named: _print_report(str(message), mark="warning: ")
            yield
    finally:
        log.removeHandler(console)
        log.setLevel(level)


def _print_report(message: str, *, mark: str) -> None:
    """Print on rank 0 only, but in all DataLoader workers, each of which warns about its own images."""
    worker = multiprocessing.parent_process() is not None
    if not (_is_rank_zero() or worker):
        return
    text = mark + "\n".join(printable(line) for line in message.splitlines())
    with contextlib.suppress(OSError):  # a run continues where nobody can read it
        if worker or "tqdm" not in sys.modules:  # a worker that is killed must not hold tqdm's lock
            print(text, file=sys.stderr, flush=True)
        else:
            sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)  # above a progress bar


def _is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0"


def error_message(error: BaseException) -> str:
    """The message of an error, without the traceback that a DataLoader worker puts in front of it."""
    text = str(error)
    marker = f"{type(error).__name__}: "
    return printable(text.rsplit(marker, 1)[-1].strip() if "Original Traceback" in text else text)
