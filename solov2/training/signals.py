"""Signals that stop a run: all ranks agree on the step after which they save a checkpoint and stop."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from solov2 import distributed
from solov2.errors import RunFailed
from solov2.training.folder import latest_checkpoint

INTERRUPTED = 130  # exit code after Ctrl-C
STOPPED = 75  # exit code after any other signal (EX_TEMPFAIL in sysexits.h: try again later)
RESPONSE_SECONDS = 5  # before a rank is reported as unresponsive
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Stopped(RunFailed):
    """A signal stopped the run, and its last step is saved; `code` is the exit code."""

    def __init__(self, number: int, folder: Path) -> None:
        self.code = INTERRUPTED if number == signal.SIGINT else STOPPED
        super().__init__(stop_message(number, folder))


def stop_message(number: int, folder: Path) -> str:
    """The last line of a run that a signal stopped: which signal, and how to resume."""
    reason = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    return f"{reason}; " + (
        f"continue with: --resume --output {folder}" if latest_checkpoint(folder) else "no checkpoint yet"
    )


class StopSignal:
    """Context manager that catches SIGTERM, SIGUSR1, SIGHUP (a closed terminal) and Ctrl-C.

    All ranks call `poll` after each step, so that they stop after the same step, whichever of them received the signal.
    A second Ctrl-C interrupts immediately. Signals that are ignored on entry (nohup) stay ignored.

    Args:
        timeout: seconds to wait for another rank before it is an error.
        folder: run folder, for the message of `Stopped`.
    """

    def __init__(self, timeout: float, folder: Path) -> None:
        self.received = 0
        self.timeout, self.folder = timeout, folder
        self._group: dist.ProcessGroup | None = None
        self._roll_call: dist.ProcessGroup | None = None
        if distributed.world_size() > 1:
            self._group, self._roll_call = (  # type: ignore[assignment]  # an integer only on ranks outside the group
                dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout)) for _ in range(2)
            )

    def __enter__(self) -> StopSignal:
        caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
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

    def until_signaled(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches; raise `Stopped` as soon as this process receives a signal, without asking other ranks.

        After the last batch, wait for the other ranks: one that does not respond is an error.
        """
        for batch in batches:
            if self.received:
                raise Stopped(self.received, self.folder)
            yield batch
        number = self.poll()
        if number:
            raise Stopped(number, self.folder)

    @contextlib.contextmanager
    def report_unresponsive_ranks(self) -> Iterator[None]:
        """Turn the timeout of a collective into `RunFailed`, with the ranks that do not respond."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RunFailed) or self._roll_call is None or "timed out" not in str(error).lower():
                raise
            try:
                dist.monitored_barrier(
                    self._roll_call, datetime.timedelta(seconds=RESPONSE_SECONDS), wait_all_ranks=True
                )
                missing = "all ranks respond now"
            except RuntimeError as failure:
                missing = str(failure).splitlines()[0]
            raise RunFailed(
                f"rank {distributed.rank()} waited for another rank for more than {self.timeout:.0f} seconds "
                f"(train.stall_seconds): {missing}"
            ) from error

    def poll(self) -> int:
        """Number of a signal that any rank has received; 0 for none.

        The hosts wait for each other but not for their devices, which still compute the step just queued. Unresponsive
        ranks must be found here: if another step were queued first, the host could block on a full queue.
        """
        if self._group is None:
            return self.received
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)
