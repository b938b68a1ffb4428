"""How a command runs and ends: exit codes, and a user's mistake as one sentence on stderr without a traceback."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from solov2.commands.arguments import Parser
from solov2.data.watch import kill_children
from solov2.errors import InputError, RunFailed, printable

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
HEAD_START, STAGGER = 3.0, 0.5  # seconds


def run_command(
    name: str,
    build_parser: Callable[[str], Parser],
    run: Callable[[argparse.Namespace], int],
    words: Sequence[str] | None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """Parse the words, run the command, and turn its expected failures into exit codes.

    Args:
        name: of the command.
        build_parser: takes the name to print in usage texts, as it was typed.
        run: takes what was parsed, with the words themselves in `args.words`; returns the exit code.
        words: None for those of this process.
        interrupted: printed after Ctrl-C, unless the interruption itself says more.

    Returns:
        The code of `run`; 2 for a user's mistake, a full disk or missing permission; 1 for a run that failed (a loss
        that is not finite, a process that does not respond); 130 after Ctrl-C.

    Raises:
        KeyboardInterrupt: after Ctrl-C where `words` were given: a caller in Python wants to know.
        SystemExit: after --help.
    """
    others = set(multiprocessing.active_children())
    typed = list(sys.argv[1:] if words is None else words)
    code = INTERRUPTED
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            args = build_parser(typed_name(name)).parse_args(typed, argparse.Namespace(words=typed))
            code = run(args)
    except KeyboardInterrupt as error:
        if _speaks():
            print(str(error) or interrupted, file=sys.stderr)
    except (ImportError, RunFailed, TimeoutError) as error:
        _print_error(error)
        code = FAILED
    except (InputError, OSError) as error:
        _print_error(error)
        code = MISTAKE
    finally:
        kill_children(but=others)
    if code == INTERRUPTED and words is not None:
        raise KeyboardInterrupt
    return code


def typed_name(name: str) -> str:
    """The words that started the command `name`, as the user typed them: "train.py", "solov2 train", ..."""
    script = Path(sys.argv[0])
    if script.parts[-2:] == ("solov2", "__main__.py"):
        return f"python -m solov2 {name}"
    own = script.suffix == ".py" and script.stem != "__main__"  # one of ours or of the user's
    return script.name if own or script.stem == f"solov2-{name}" else f"solov2 {name}"


def own_command(name: str) -> list[str]:
    """The words that start the command `name` again, for processes of its own; Python itself goes in front."""
    script = Path(sys.argv[0])
    if script.stem == "solov2":
        return [sys.argv[0], name]
    whole = script.is_file() and script.stem != "__main__"  # a script, be it a user's own, does more than the command
    return [sys.argv[0]] if whole else ["-m", "solov2", name]


def _print_error(error: BaseException) -> None:
    """Of several processes that make the same mistake, one prints it.

    A launcher ends all processes as soon as one has ended. So rank 0 prints at once, and the others wait to be ended; a
    rank that is alone with its error prints it after the wait.
    """
    if not _speaks():
        time.sleep(HEAD_START + STAGGER * int(os.environ.get("LOCAL_RANK", 0)))
    print(f"error: {sentence(error)}", file=sys.stderr, flush=True)


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
