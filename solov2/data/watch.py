"""Loading processes that die or hang: reported with the images they were reading, and ended with the command."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Collection, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from solov2.errors import RunFailed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from solov2.data.coco import CocoInstances

FROZEN_SECONDS = 5  # added to torch's own timeout, which does not cover a process that is frozen as a whole
LOOK_EVERY = 5  # seconds
TIMED_OUT = "timed out after"  # part of torch's message
SILENT = "was silent for longer than train.stall_seconds: slow or hanging storage is the usual cause"
ENDED = "ended unexpectedly: memory that ran out is the usual cause, fewer --workers help"
KILLED = "was killed by a signal: memory that ran out is the usual cause, fewer --workers help"


def watched(loader: DataLoader, dataset: CocoInstances) -> Iterator[dict[str, Any]]:
    """The loader's batches; a loading process that hangs or dies is an error that names its images.

    For the main thread only: it is woken by signals. torch's own handler of SIGCHLD, which raises wherever the main
    thread is, is taken off for good; loaders of others then learn of a dead process within five seconds.

    Args:
        loader: made by `solov2.data.build`.
        dataset: the images it loads.

    Raises:
        RunFailed: the sentence says what usually helps.
    """
    delivered, before = 0, signal.getsignal(signal.SIGCHLD)
    try:
        with _waiting(loader):
            batches = iter(loader)
        while True:
            with _waiting(loader):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            delivered += 1
    except Exception as error:
        workers = _workers(loader)
        reason = _failure(error, workers)
        if reason is None:
            raise
        kill_children(but=set(multiprocessing.active_children()) - set(workers))
        batch = next(itertools.islice(loader.batch_sampler or (), delivered, None), [])
        indices = [entry if isinstance(entry, int) else entry[0] for entry in batch]
        names = ", ".join(dataset.file_name(dataset.image_ids[index]) for index in indices)
        raise RunFailed(f"a loading process {reason}; it was at or near the images {names}") from error
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def _waiting(loader: DataLoader) -> Iterator[None]:
    """A wait for the loader: a loading process that ends, or a wait beyond the loader's timeout, is an error inside.

    torch stops waiting for a batch by itself, but not for a tensor of a batch that was already announced, which it
    fetches from the process: a process that is frozen as a whole (SIGSTOP, a frozen container) never hands it over.
    """
    deadline = time.monotonic() + loader.timeout + FROZEN_SECONDS

    def check(_number: int = 0, _frame: FrameType | None = None) -> None:
        if _end_of(_workers(loader)) is not None:
            raise EOFError
        if time.monotonic() > deadline:
            raise TimeoutError(TIMED_OUT)

    before = signal.signal(signal.SIGALRM, check)
    try:
        check()  # a process may have ended since the last wait
        signal.signal(signal.SIGCHLD, check)
        # Again and again, since an exception can be lost where Python runs a finalizer.
        signal.setitimer(signal.ITIMER_REAL, LOOK_EVERY if loader.num_workers else 0, LOOK_EVERY)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, before)


def _workers(loader: DataLoader) -> list[Any]:
    return getattr(getattr(loader, "_iterator", None), "_workers", [])


def _end_of(workers: Collection[Any]) -> str | None:
    """What ended one of the loading processes early; None while all of them are well."""
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    return None if not codes else KILLED if codes[0] < 0 else ENDED


def _failure(error: Exception, workers: Collection[Any]) -> str | None:
    """What happened to a loading process, if that is what caused the error."""
    if isinstance(error, (EOFError, ConnectionError, FileNotFoundError)):  # raised by the pipes of a process that ends
        ending = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
        for worker in workers:
            if worker.sentinel in ending:
                worker.join(1)  # its pipes close before its exit code is there
    if isinstance(error, (RuntimeError, TimeoutError)) and TIMED_OUT in str(error):
        return _end_of(workers) or SILENT
    return _end_of(workers)


def kill_children(but: Collection[multiprocessing.process.BaseProcess] = ()) -> None:
    """End the processes that this one has started, except some; for the main thread.

    Loading processes ignore a first SIGTERM (`data.loader`) and a hanging one hears none, so Python would wait for them
    forever at its own end. torch's SIGCHLD handler is taken off meanwhile: it would report their end as an error.
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
