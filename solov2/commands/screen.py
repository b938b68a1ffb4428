"""What a command shows: text that cannot steer a terminal, on standard streams that can always be written to."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, cast

from solov2.errors import printable


class Stream:
    """A standard stream to which printing never fails, so that no file is left unwritten because of it.

    Characters that its encoding lacks become escape sequences; a closed pipe, a full disk and a closed stream are
    remembered and not raised. Everything else is that of the wrapped stream.

    Args:
        stream: `sys.stdout` or `sys.stderr`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; returns its length."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._remember(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._remember(error)

    def _remember(self, error: OSError | ValueError) -> None:
        if self._failure is None:  # ValueError: the stream was closed
            self._failure = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))

    def end(self) -> OSError | None:
        """Flush; returns why text was lost, or None if none was, or only because the reader closed the pipe."""
        self.flush()
        if self._failure is None:
            return None
        with contextlib.suppress(OSError, ValueError):  # Python flushes again on exit, and would complain there
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        return None if isinstance(self._failure, BrokenPipeError) else self._failure


@contextlib.contextmanager
def safe_streams() -> Iterator[Stream]:
    """Wrap standard output and standard error in `Stream`, and yield that of standard output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the shell: no file that is opened later may get its number
            os.open(os.devnull, os.O_RDWR)
    with contextlib.ExitStack() as stack:
        out, err = (
            Stream(stack.enter_context(open(os.devnull, "w", encoding="utf-8")) if stream is None else stream)
            for stream in (sys.stdout, sys.stderr)
        )
        stack.enter_context(contextlib.redirect_stdout(cast(TextIO, out)))
        stack.enter_context(contextlib.redirect_stderr(cast(TextIO, err)))
        try:
            yield out
        finally:
            out.end()
            err.end()


def show(*lines: str, file: TextIO | None = None) -> None:
    """Print lines on standard output or `file`; control characters in them, a newline too, become escape sequences."""
    print("\n".join(map(printable, lines)), file=file, flush=True)


class _Console(logging.Handler):
    """Prints what the library logs: warnings with that word in front, the rest as it is."""

    def emit(self, record: logging.LogRecord) -> None:
        _report(printable(record.getMessage()), mark="warning: " if record.levelno >= logging.WARNING else "")


@contextlib.contextmanager
def reports_on_stderr() -> Iterator[None]:
    """Print on stderr what the library logs (from INFO) and the warnings of Python and torch."""

    def warn(message: Warning | str, *_details: Any, **_named: Any) -> None:
        _report("\n".join(map(printable, str(message).splitlines())), mark="warning: ")

    log, console = logging.getLogger("solov2"), _Console()
    level = log.level
    log.addHandler(console)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn
            yield
    finally:
        log.removeHandler(console)
        log.setLevel(level)


def _report(text: str, *, mark: str) -> None:
    """Print on rank 0 only, but in all DataLoader workers, each of which warns about its own images."""
    worker = multiprocessing.parent_process() is not None
    if not (is_rank_zero() or worker):
        return
    with contextlib.suppress(OSError):  # a worker may have another stream than its parent's
        if worker or "tqdm" not in sys.modules:  # a worker that is killed must not hold tqdm's lock
            print(mark + text, file=sys.stderr, flush=True)
        else:
            sys.modules["tqdm"].tqdm.write(mark + text, file=sys.stderr)  # above a progress bar


def is_rank_zero() -> bool:
    """Whether this process prints for all."""
    return os.environ.get("RANK", "0") == "0"
