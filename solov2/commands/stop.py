"""Being told to stop: a flag that all processes raise together, so that they save the same step."""

from __future__ import annotations

import contextlib
import datetime
import signal
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from solov2 import distributed
from solov2.errors import RunFailed

STOPPED = 75  # exit code (EX_TEMPFAIL of sysexits.h: try again later) after a signal but Ctrl-C's, checkpoint written
INTERRUPTED = 130  # after Ctrl-C
ANSWER_SECONDS = 5  # given to a silent process before it is named
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Stopped(Exception):
    """The run was told to stop; `code` is the exit code."""

    def __init__(self, number: int) -> None:
        self.code = INTERRUPTED if number == signal.SIGINT else STOPPED
        super().__init__(signal.Signals(number).name)


class StopSignal:
    """Receives SIGTERM, SIGUSR1, SIGHUP (a lost terminal) and Ctrl-C while it is entered; a second Ctrl-C interrupts at
    once. A signal that is ignored (nohup) stays so.

    `poll` is called by all processes after each step, so that everybody stops after the same step, whoever got the
    signal.

    Args:
        timeout: seconds after which the silence of another process is an error.
    """

    def __init__(self, timeout: float) -> None:
        self.received = 0
        self.timeout = timeout
        self._group = self._roll = None
        if distributed.world_size() > 1:
            self._group, self._roll = (
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

    def ending(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, until this process gets a signal: then `Stopped`, without asking the others.

        After the last batch it waits for the others, whose silence is found here.
        """
        for batch in batches:
            if self.received:
                raise Stopped(self.received)
            yield batch
        number = self.poll()
        if number:
            raise Stopped(number)

    @contextlib.contextmanager
    def naming_the_silent(self) -> Iterator[None]:
        """Turns an exchange that timed out into `RunFailed` with the ranks that do not answer."""
        try:
            yield
        except RuntimeError as error:
            if self._roll is None or "timed out" not in str(error).lower():
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
