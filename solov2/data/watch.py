"""Watch DataLoader workers: report one that dies or hangs with the images it was reading, and end them on exit."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from solov2.errors import InputError, RunFailed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from solov2.data.image_dataset import ImageDataset

Result = TypeVar("Result")

CHECK_SECONDS = 0.5  # between checks of the workers, and of the caller, while it waits for a batch
SHARED_MEMORY = Path("/dev/shm")  # workers hand over their batches here
STALLED = "sent no data for longer than train.stall_seconds, usually because storage is slow or hangs"
EXITED = "exited unexpectedly, usually because memory ran out (try fewer --workers)"
KILLED = "was killed, usually because memory ran out (try fewer --workers)"
OUT_OF_MEMORY = "ran out of memory (try fewer --workers)"
OUT_OF_FILES = "could not open another file: raise the limit (ulimit -n), or use fewer --workers"
MORE_SHARED_MEMORY = (
    "in a container enlarge it with docker run --shm-size=8g or --ipc=host; otherwise use fewer --workers or a "
    "smaller --batch-size"
)


def watched(
    loader: DataLoader,
    dataset: ImageDataset,
    *,
    stall_seconds: float = 0,
    check: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """The loader's batches; if a worker hangs or dies, an error that names the images it was reading.

    Each batch is fetched in a thread of its own, because a fetch cannot be interrupted: it may wait for a tensor from a
    worker that is suspended. This works in any thread and on every system, since it needs no signals.

    Args:
        loader: built by `solov2.data.build`.
        dataset: the images it loads.
        stall_seconds: how long to wait for a batch before it is an error; 0 waits forever. Time during which this
            process itself was suspended does not count.
        check: called every `CHECK_SECONDS` while waiting, so that it can raise.

    Raises:
        RunFailed: a worker died or hung, or shared memory is full; the message names the images and the usual cause.
    """
    if not loader.num_workers:
        yield from loader
        return
    delivered = 0

    def failed(reason: str) -> RunFailed:
        _kill_workers(loader)
        batch = next(itertools.islice(loader.batch_sampler or (), delivered, None), [])
        indices = [entry if isinstance(entry, int) else entry[0] for entry in batch]
        names = ", ".join(dataset.file_name(dataset.image_ids[index]) for index in indices)
        return RunFailed(f"a DataLoader worker {reason}; images at or near the failure: {names}")

    def wait(call: Callable[[], Result]) -> Result:
        future = _in_thread(call)
        waited, before = 0.0, time.monotonic()
        while not future.done():
            check()
            reason = _exit_reason(_workers(loader)) or (STALLED if 0 < stall_seconds < waited else None)
            if reason is not None:
                raise failed(reason)
            futures.wait([future], timeout=CHECK_SECONDS)
            now = time.monotonic()
            waited += min(now - before, 2 * CHECK_SECONDS)  # more only if this process was suspended
            before = now
        try:
            return future.result()
        except (InputError, RunFailed) as error:
            _kill_workers(loader)
            raise type(error)(worker_message(error)) from error
        except Exception as error:
            reason = _failure_reason(error, _workers(loader))
            if reason is None:
                raise
            raise failed(reason) from error

    with _without_torch_handler():
        batches = wait(lambda: iter(loader)) if _workers(loader) else _start_workers(loader)
        while (batch := wait(lambda: next(batches, None))) is not None:
            yield batch
            delivered += 1


def _start_workers(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The loader's first iterator, created in the caller's thread without leaving torch's SIGCHLD handler there.

    torch pins memory in a thread for the device that is current where the iterator is created; that is a setting of the
    thread, and a new thread would make every rank take memory on the first device.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    batches = iter(loader)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return batches


def _in_thread(call: Callable[[], Result]) -> futures.Future[Result]:
    """Run `call` in a daemon thread, which does not keep the process alive if it never returns."""
    future: futures.Future[Result] = futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _workers(loader: DataLoader) -> list[Any]:
    return getattr(getattr(loader, "_iterator", None), "_workers", [])


def _kill_workers(loader: DataLoader) -> None:
    kill_children(exclude=set(multiprocessing.active_children()) - set(_workers(loader)))


def _exit_reason(workers: Collection[Any]) -> str | None:
    """Why one of the workers exited early, or None if none did."""
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if not codes:
        return None
    if codes[0] > 0:
        return EXITED
    if -codes[0] == getattr(signal, "SIGBUS", None):  # what touching a page of a full /dev/shm ends in
        return shared_memory_full()
    return KILLED if -codes[0] == getattr(signal, "SIGKILL", None) else f"was ended by {_signal_name(-codes[0])}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _failure_reason(error: Exception, workers: Collection[Any]) -> str | None:
    """What happened to a worker, or None if that is not what caused the error."""
    if isinstance(error, (EOFError, ConnectionError, FileNotFoundError)):  # raised by the pipes of an exiting worker
        exited = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
        for worker in workers:
            if worker.sentinel in exited:
                worker.join(1)  # its pipes close before its exit code is known
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if "Too many open files" in str(error) or "ancdata" in str(error):  # Python's words when a descriptor is lost
        return OUT_OF_FILES
    reason = _exit_reason(workers)
    if reason is None and isinstance(error, (EOFError, ConnectionError)) and "Original Traceback" not in str(error):
        return OUT_OF_FILES  # a worker that is alive hangs up if it cannot pass a file on
    return reason


def worker_message(error: BaseException) -> str:
    """The message of an error, without the traceback that a DataLoader worker puts in front of it."""
    text = str(error)
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip() if "Original Traceback" in text else text


def shared_memory_full() -> str:
    """What a worker did that found no room for its batch, and the way out."""
    return f"found the shared memory {SHARED_MEMORY} full{_shared_memory_size()}: {MORE_SHARED_MEMORY}"


def shared_memory_warning(batch_bytes: int, batches: int) -> str | None:
    """A warning if shared memory has no room for all batches that are in flight, or None.

    Args:
        batch_bytes: bytes of a batch, at most.
        batches: batches of all processes of this machine that the workers prepare or that are still in use.
    """
    needed = batch_bytes * batches
    if not needed or not SHARED_MEMORY.is_dir() or needed <= shutil.disk_usage(SHARED_MEMORY).free:
        return None
    return (
        f"the DataLoader workers may need {_megabytes(needed)} of shared memory for up to {batches} batches, more "
        f"than {SHARED_MEMORY} has{_shared_memory_size()}: {MORE_SHARED_MEMORY}"
    )


def _shared_memory_size() -> str:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # a system that keeps shared memory elsewhere
        return ""
    return f" ({_megabytes(usage.free)} of {_megabytes(usage.total)} free)"


def _megabytes(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB"


@contextlib.contextmanager
def _without_torch_handler() -> Iterator[None]:
    """Remove torch's SIGCHLD handler, which raises wherever the main thread happens to be when a worker exits.

    It is there only if the caller has used a DataLoader in the main thread before. Other handlers stay.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    is_torch = getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"
    if not is_torch or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def kill_children(exclude: Collection[multiprocessing.process.BaseProcess] = ()) -> None:
    """Kill the child processes of this one, except those in `exclude`.

    Workers ignore a first SIGTERM (`data.loader`), and a hanging one ignores all of them, so Python would wait for them
    forever on exit.
    """
    children = [process for process in multiprocessing.active_children() if process not in exclude]
    with _without_torch_handler():
        for process in children:
            process.kill()
        for process in children:
            process.join(1)
