"""Watch DataLoader workers: report one that dies or hangs with the images it was reading, and end them on exit."""

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

GRACE_SECONDS = 5  # added to torch's own timeout, which does not cover a worker that is suspended as a whole
CHECK_SECONDS = 5  # between checks of the workers
TIMED_OUT = "timed out after"  # part of torch's message
STALLED = "sent no data for longer than train.stall_seconds, usually because storage is slow or hangs"
EXITED = "exited unexpectedly, usually because memory ran out (try fewer --workers)"
KILLED = "was killed by a signal, usually because memory ran out (try fewer --workers)"


def watched(loader: DataLoader, dataset: CocoInstances) -> Iterator[dict[str, Any]]:
    """The loader's batches; if a worker hangs or dies, an error that names the images it was reading.

    For the main thread only, because it handles signals. torch's own SIGCHLD handler, which raises wherever the main
    thread happens to be, stays removed; other loaders then notice a dead worker within five seconds.

    Args:
        loader: built by `solov2.data.build`.
        dataset: the images it loads.

    Raises:
        RunFailed: a worker died or hung; the message names the images and the usual cause.
    """
    delivered, before = 0, signal.getsignal(signal.SIGCHLD)
    try:
        with _watch_workers(loader):
            batches = iter(loader)
        while True:
            with _watch_workers(loader):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            delivered += 1
    except Exception as error:
        workers = _workers(loader)
        reason = _worker_failure(error, workers)
        if reason is None:
            raise
        kill_children(exclude=set(multiprocessing.active_children()) - set(workers))
        batch = next(itertools.islice(loader.batch_sampler or (), delivered, None), [])
        indices = [entry if isinstance(entry, int) else entry[0] for entry in batch]
        names = ", ".join(dataset.file_name(dataset.image_ids[index]) for index in indices)
        raise RunFailed(f"a DataLoader worker {reason}; images at or near the failure: {names}") from error
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def _watch_workers(loader: DataLoader) -> Iterator[None]:
    """Raise inside the block if a worker exits early, or if the block takes longer than the loader's timeout.

    torch's timeout covers the wait for a batch, but not for the tensors of a batch already announced, which are fetched
    from the worker: one that is suspended as a whole (SIGSTOP, a frozen container) never hands them over.
    """
    deadline = time.monotonic() + loader.timeout + GRACE_SECONDS

    def check(_number: int = 0, _frame: FrameType | None = None) -> None:
        if _exit_reason(_workers(loader)) is not None:
            raise EOFError
        if time.monotonic() > deadline:
            raise TimeoutError(TIMED_OUT)

    before = signal.signal(signal.SIGALRM, check)
    try:
        check()  # a worker may have exited since the last wait
        signal.signal(signal.SIGCHLD, check)
        # Repeatedly, because an exception is lost if it is raised while Python runs a finalizer.
        signal.setitimer(signal.ITIMER_REAL, CHECK_SECONDS if loader.num_workers else 0, CHECK_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, before)


def _workers(loader: DataLoader) -> list[Any]:
    return getattr(getattr(loader, "_iterator", None), "_workers", [])


def _exit_reason(workers: Collection[Any]) -> str | None:
    """Why one of the workers exited early, or None if none did."""
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    return None if not codes else KILLED if codes[0] < 0 else EXITED


def _worker_failure(error: Exception, workers: Collection[Any]) -> str | None:
    """What happened to a worker, or None if that is not what caused the error."""
    if isinstance(error, (EOFError, ConnectionError, FileNotFoundError)):  # raised by the pipes of an exiting worker
        exited = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
        for worker in workers:
            if worker.sentinel in exited:
                worker.join(1)  # its pipes close before its exit code is known
    if isinstance(error, (RuntimeError, TimeoutError)) and TIMED_OUT in str(error):
        return _exit_reason(workers) or STALLED
    return _exit_reason(workers)


def kill_children(exclude: Collection[multiprocessing.process.BaseProcess] = ()) -> None:
    """Kill the child processes of this one, except those in `exclude`; for the main thread.

    Workers ignore a first SIGTERM (`data.loader`), and a hanging one ignores all of them, so Python would wait for them
    forever on exit. torch's SIGCHLD handler is removed meanwhile, because it would report their end as an error.
    """
    children = [process for process in multiprocessing.active_children() if process not in exclude]
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
