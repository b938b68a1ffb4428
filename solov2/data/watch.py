"""Loading processes that die or hang: reported with the images they were reading, and ended with the command."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
from collections.abc import Collection, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from solov2.errors import RunFailed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from solov2.data.coco import CocoInstances

FROZEN_SECONDS = 5  # added to torch's own timeout, which does not cover a process that is frozen as a whole
TIMED_OUT = "timed out after"
FAILURES = {  # part of torch's message -> what it means
    TIMED_OUT: "was silent for longer than train.stall_seconds: slow or hanging storage is the usual cause",
    "exited unexpectedly": "ended unexpectedly: memory that ran out is the usual cause, fewer --workers help",
    "is killed by signal": "was killed by a signal: memory that ran out is the usual cause, fewer --workers help",
}


def watched(loader: DataLoader, dataset: CocoInstances) -> Iterator[dict[str, Any]]:
    """The loader's batches; a loading process that hangs or dies is an error that names its images.

    For the main thread only: it is woken by a signal.

    Args:
        loader: made by `solov2.data.build`.
        dataset: the images it loads.

    Raises:
        RunFailed: the sentence says what usually helps.
    """
    delivered = 0
    try:
        with _loader_timeout(loader):
            batches = iter(loader)
        while True:
            with _loader_timeout(loader):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            delivered += 1
    except (RuntimeError, TimeoutError) as error:
        reason = next((text for text in FAILURES if text in str(error)), None)
        if reason is None:
            raise
        workers = getattr(getattr(loader, "_iterator", None), "_workers", [])
        kill_children(but=set(multiprocessing.active_children()) - set(workers))
        batch = next(itertools.islice(loader.batch_sampler or (), delivered, None), [])
        indices = [entry if isinstance(entry, int) else entry[0] for entry in batch]
        names = ", ".join(dataset.file_name(dataset.image_ids[index]) for index in indices)
        raise RunFailed(f"a loading process {FAILURES[reason]}; it was at or near the images {names}") from error


@contextlib.contextmanager
def _loader_timeout(loader: DataLoader) -> Iterator[None]:
    """Limit the wait for loading processes to their timeout and a little more.

    torch stops waiting for a batch by itself, but not for a tensor of a batch that was already announced, which it
    fetches from the process: a process that is frozen as a whole (SIGSTOP, a frozen container) never hands it over.

    Raises:
        TimeoutError: the wait took longer.
    """

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(TIMED_OUT)

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, loader.timeout + FROZEN_SECONDS if loader.num_workers else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
