"""Signals that stop a run: a flag that all processes raise together, so that they save the same step."""

from __future__ import annotations

import contextlib
import datetime
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from solov2 import distributed
from solov2.errors import RunFailed
from solov2.training.folder import latest_checkpoint

STOPPED = 75  # exit code (EX_TEMPFAIL of sysexits.h: try again later) after a signal but Ctrl-C's, checkpoint written
INTERRUPTED = 130  # after Ctrl-C
ANSWER_SECONDS = 5  # given to a silent process before it is named
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Stopped(RunFailed):
    """The run was told to stop, and its last step is saved; `code` is the exit code."""

    def __init__(self, number: int, folder: Path) -> None:
        self.code = INTERRUPTED if number == signal.SIGINT else STOPPED
        super().__init__(way_on(number, folder))


def way_on(number: int, folder: Path) -> str:
    """The last line of a run that was told to stop: which signal, and how to go on."""
    reason = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    return f"{reason}; " + (
        f"go on with: --resume --output {folder}" if latest_checkpoint(folder) else "no checkpoint yet"
    )


class StopSignal:
    """Receives SIGTERM, SIGUSR1, SIGHUP (a lost terminal) and Ctrl-C while it is entered; a second Ctrl-C interrupts at
    once. A signal that is ignored (nohup) stays so.

    `poll` is called by all processes after each step, so that everybody stops after the same step, whoever got the
    signal.

    Args:
        timeout: seconds after which the silence of another process is an error.
        folder: of the run, for the message of `Stopped`.
    """

    def __init__(self, timeout: float, folder: Path) -> None:
        self.received = 0
        self.timeout, self.folder = timeout, folder
        self._group: dist.ProcessGroup | None = None
        self._roll: dist.ProcessGroup | None = None
        if distributed.world_size() > 1:
            self._group, self._roll = (  # type: ignore[assignment]  # a number only for processes left out
                dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout)) for _ in range(2)
            )

    def __enter__(self) -> StopSignal:
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            print("interrupted: ending with the step and a checkpoint; once more to end at once", file=sys.stderr)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def until_signaled(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, until this process gets a signal: then `Stopped`, without asking the others.

        After the last batch it waits for the others, whose silence is found here.
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
        """Turn an exchange that timed out into `RunFailed` with the ranks that do not answer."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RunFailed) or self._roll is None or "timed out" not in str(error).lower():
                raise
            try:
                dist.monitored_barrier(self._roll, datetime.timedelta(seconds=ANSWER_SECONDS), wait_all_ranks=True)
                silent = "all processes answer now"
            except RuntimeError as roll_call:
                silent = str(roll_call).splitlines()[0]
            raise RunFailed(
                f"process {distributed.rank()} waited for the others for more than {self.timeout:.0f} seconds "
                f"(train.stall_seconds): {silent}"
            ) from error

    def poll(self) -> int:
        """Number of the signal that some process got since the last call; 0 for none.

        The hosts wait for each other, not for their devices, which have the step just queued to compute. A process that
        is silent is found here: were another step queued first, the host could be stuck in a full queue.
        """
        if self._group is None:
            return self.received
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)
