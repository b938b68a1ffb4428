"""How a command runs and ends: exit codes, and user errors as one line on stderr without a traceback."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from solov2.commands.arguments import Parser
from solov2.commands.screen import is_rank_zero, reports_on_stderr, safe_streams, show
from solov2.data.watch import kill_children, worker_message
from solov2.errors import InputError, RunFailed, memory_shortage, printable

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit codes
HEAD_START, STAGGER = 3.0, 0.5  # seconds that ranks other than 0 wait before printing an error


def run_command(
    name: str,
    build_parser: Callable[[str], Parser],
    run: Callable[[argparse.Namespace], int],
    words: Sequence[str] | None,
    *,
    interrupted: str = "interrupted",
    save_memory: str = "",
) -> int:
    """Parse the arguments, run the command, and turn its expected failures into exit codes.

    Args:
        name: name of the command.
        build_parser: builds the parser, given the command as the user typed it.
        run: runs the command, given the parsed arguments (`args.words` has the raw ones); returns the exit code.
        words: the arguments; default: those of the process.
        interrupted: printed after Ctrl-C, unless the exception has its own message.
        save_memory: what to do if memory runs out, for the error message.

    Returns:
        The code of `run`; 2 for a user error, a full disk or missing permission; 1 for a failed run (a non-finite
        loss, a process that does not respond, exhausted memory); 130 after Ctrl-C. A pipe that its reader closed
        changes nothing.

    Raises:
        KeyboardInterrupt: after Ctrl-C if `words` were given, so that a caller in Python learns of it.
        SystemExit: after --help.
    """
    earlier_children = set(multiprocessing.active_children())
    typed = list(sys.argv[1:] if words is None else words)
    code = INTERRUPTED
    with safe_streams() as standard_output:
        try:
            with reports_on_stderr():
                args = build_parser(typed_name(name)).parse_args(typed, argparse.Namespace(words=typed))
                code = run(args)
        except KeyboardInterrupt as error:
            if is_rank_zero():
                show(str(error) or interrupted, file=sys.stderr)
        except (RunFailed, TimeoutError) as error:
            _print_error(error)
            code = FAILED
        except (InputError, OSError) as error:
            _print_error(error)
            code = USER_ERROR
        except (MemoryError, RuntimeError) as error:
            shortage = memory_shortage(error)
            if shortage is None:
                raise
            _print_error(RunFailed(f"{shortage}; {save_memory}" if save_memory else shortage))
            code = FAILED
        finally:
            kill_children(exclude=earlier_children)
        lost = standard_output.end()
        if lost is not None:
            _print_error(OSError(lost.errno, lost.strerror, "standard output"))
            code = code or USER_ERROR
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
    if not is_rank_zero():
        time.sleep(HEAD_START + STAGGER * int(os.environ.get("LOCAL_RANK", 0)))
    show(f"error: {error_message(error)}", file=sys.stderr)


def error_message(error: BaseException) -> str:
    """The message of an error in one line, without the traceback that a DataLoader worker puts in front of it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return printable(f"{os.fsdecode(error.filename)}: {error.strerror}")
    return printable(worker_message(error))
