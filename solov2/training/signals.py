"""Signals, a time limit and callbacks that stop a run: all ranks agree on the step after which they save and stop."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from solov2 import distributed
from solov2.errors import RunFailed
from solov2.training.callbacks import Callbacks
from solov2.training.folder import latest_checkpoint

INTERRUPTED = 130  # exit code after Ctrl-C
STOPPED = 75  # exit code after any other reason (EX_TEMPFAIL in sysexits.h: try again later)
RESPONSE_SECONDS = 5  # before a rank is reported as unresponsive
BEAT_SECONDS = 1  # between two looks at the clock
ASKED, TIME_UP, RANK_FAILED = 500, 501, 1000  # returned by `StopSignal.poll`, like signals, whose numbers are smaller
SIGNALS = tuple(  # Windows has only two of them
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)
)
DISCONNECTED = (  # parts of the errors of gloo and nccl after another rank has died
    "connection closed",
    "connection reset",
    "connection refused",
    "connection was likely closed",
    "broken pipe",
    "remote process exited",
)


class Stopped(RunFailed):
    """A signal, the time limit or a callback stopped the run, and its last step is saved; `code` is the exit code."""

    def __init__(self, number: int, folder: Path) -> None:
        self.code = INTERRUPTED if number == signal.SIGINT else STOPPED
        super().__init__(stop_message(number, folder))


def stop_message(number: int, folder: Path) -> str:
    """The last line of a run that stopped: by which signal, or `ASKED` or `TIME_UP`, and how to resume."""
    known = {
        signal.SIGINT: "interrupted",
        TIME_UP: "stopped at the time limit (--max-hours)",
        ASKED: "stopped by a callback",
    }
    reason = known.get(number) or f"stopped by {signal.Signals(number).name}"
    return f"{reason}; " + (
        f"continue with: --resume --output {folder}" if latest_checkpoint(folder) else "no checkpoint yet"
    )


class StopSignal:
    """Context manager that catches SIGTERM, SIGUSR1, SIGHUP (a closed terminal) and Ctrl-C.

    All ranks call `poll` before each step, so that they stop after the same step, whichever received the signal. A
    second Ctrl-C interrupts immediately. Signals that are ignored on entry (nohup) stay ignored, and in any thread but
    the main one all signals are left alone, since Python handles them only there.

    Args:
        timeout: seconds to wait for another rank before it is an error.
        folder: run folder, for the message of `Stopped`.
        deadline: time of `time.monotonic` after which `poll` returns `TIME_UP`.
        callbacks: of this rank; `poll` returns `ASKED` once one has requested a stop.
    """

    def __init__(
        self, timeout: float, folder: Path, *, deadline: float = math.inf, callbacks: Callbacks | None = None
    ) -> None:
        self.received = 0
        self.timeout, self.folder, self.deadline, self.callbacks = timeout, folder, deadline, callbacks
        self._group: Any = None
        if distributed.world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))

    def __enter__(self) -> StopSignal:
        main = threading.current_thread() is threading.main_thread()
        # A handler that was not installed by Python (None) could not be restored.
        caught = [n for n in SIGNALS if main and signal.getsignal(n) not in (signal.SIG_IGN, None)]
        self._before = {number: signal.signal(number, self._receive) for number in caught}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            # The handler may run inside another write to stderr, where a second buffered write raises.
            os.write(2, b"interrupted: finishing this step and saving a checkpoint; press again to quit immediately\n")
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise `Stopped` if this process has received a signal."""
        if self.received:
            raise Stopped(self.received, self.folder)

    def until_signaled(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches; raise `Stopped` as soon as this process receives a signal, without asking other ranks.

        After the last batch, wait for the other ranks: one that does not respond is an error.
        """
        for batch in batches:
            self.check()
            yield batch
        number = self.poll()
        if 0 < number < ASKED:  # for other reasons, the evaluation is completed, but the next step is not taken
            raise Stopped(number, self.folder)

    @contextlib.contextmanager
    def report_unresponsive_ranks(self) -> Iterator[None]:
        """Turn the error of a collective that waits for another rank into `RunFailed`, with the ranks that are missing.

        No rank is blamed if this process was suspended (a frozen container), which makes torch's timeouts expire.
        """
        if self._group is None:
            yield
            return
        suspension = _Suspension()
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            timed_out, died = "timed out" in text, any(words in text for words in DISCONNECTED)
            if isinstance(error, RunFailed) or not (timed_out or died):
                raise
            missing = distributed.missing_ranks(RESPONSE_SECONDS)
            waited = f"waited for more than {self.timeout:.0f} seconds (train.stall_seconds)" if timed_out else "waited"
            suspended = suspension.seconds(within=self.timeout)
            if suspended > self.timeout / 2:
                reason = f"this process was suspended for {suspended:.0f} seconds"
            elif len(missing) > 1:
                reason = f"ranks {', '.join(map(str, missing))} do not respond; they have died, failed or hang"
            elif missing:
                reason = f"rank {missing[0]} does not respond; it has died, failed or hangs"
            else:
                reason = "all respond now"
            raise RunFailed(
                f"rank {distributed.rank()} {waited} for another rank: {reason}; continue with --resume"
            ) from error
        finally:
            suspension.ended.set()

    def poll(self, *, failed: bool = False) -> int:
        """Why to stop: the number of a signal that any rank has received, `ASKED`, `TIME_UP` if the deadline has passed
        on any, or `RANK_FAILED` if any has `failed`; 0 to continue.

        The hosts wait for each other but not for their devices, which still compute the step just queued. Unresponsive
        ranks must be found here: if another step were queued first, the host could block on a full queue.
        """
        status = RANK_FAILED if failed else int(self.received)
        if not status and time.monotonic() >= self.deadline:
            status = TIME_UP
        if not status and self.callbacks is not None and self.callbacks.stop_requested:
            status = ASKED
        if self._group is None:
            return status
        flag = torch.tensor(status)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)


class _Suspension:
    """Measures for how long this process was suspended, by a thread that finds its clock ahead."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._last = (-math.inf, 0.0)  # end and length of the last suspension
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - before > RESPONSE_SECONDS:
                self._last = now, now - before
            before = now

    def seconds(self, *, within: float) -> float:
        """Length of a suspension that ended in the last `within` seconds, 0 if there was none."""
        end, length = self._last
        return length if time.monotonic() - end < within else 0.0
