"""User functions that receive the rows of a run's log, and may ask the run to stop."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from solov2.errors import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG = logging.getLogger(__name__)
CLOSING_SECONDS = 60  # that the end of a run waits for its callbacks

Callback: TypeAlias = Callable[[Mapping[str, Any]], bool | None]
"""Receives a row of log.jsonl, read-only; returns True to stop the run.

Every row has "kind" and "time" (seconds since 1970), most have "step" (completed optimizer steps of the run). Kinds, in
the order of a run: "start", "resume", "warning", "train" (mean losses of the last `train.log_every` steps), "epoch" (of
a whole epoch), "evaluation", and last "end", whose "error" is None or the reason why the run did not finish.
"""


class Callbacks:
    """Hands rows to callbacks in a thread of their own, so that a slow one does not slow the run.

    A callback that raises is reported once, by a warning, and receives nothing more; the others and the run continue.

    Args:
        callbacks: called one after the other, with each row in turn.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.stop_requested = False  # a callback has returned True
        self._callbacks = list(callbacks)
        self._rows: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="callbacks") if callbacks else None
        if self._thread is not None:
            self._thread.start()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Queue a row, which must not be changed afterwards."""
        if self._thread is not None:
            self._rows.put(MappingProxyType(dict(row)))

    def close(self) -> None:
        """Wait until the callbacks have received all rows, for at most `CLOSING_SECONDS`."""
        if self._thread is None:
            return
        self._rows.put(None)
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            LOG.warning("a callback has not returned within %d seconds and is left behind", CLOSING_SECONDS)
        self._thread = None

    def _work(self) -> None:
        while (row := self._rows.get()) is not None:
            for callback in list(self._callbacks):
                try:
                    self.stop_requested |= callback(row) is True
                except Exception as error:
                    self._callbacks.remove(callback)
                    name = getattr(callback, "__name__", type(callback).__name__)
                    LOG.warning("the callback %s failed and is not called again: %r", name, error)


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Check that all callbacks can be called.

    Raises:
        InputError: one cannot.
    """
    wrong = [callback for callback in callbacks if not callable(callback)]
    if wrong:
        raise InputError(f"callbacks must be functions of one row of the log, got {type(wrong[0]).__name__}")


class TensorBoard:
    """A callback that writes event files: the numbers of each row that has a step, as "kind/name".

    Args:
        folder: run folder; the files are created with the first row.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder
        self._events: SummaryWriter | None = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row; after the last one, close the files."""
        if self._events is None:
            self._events = tensorboard_writer()(str(self.folder))
        for name, value in row.items():
            if "step" in row and name not in ("kind", "time", "step") and isinstance(value, (int, float)):
                self._events.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        if row["kind"] == "end":
            self._events.close()


def tensorboard_writer() -> type[SummaryWriter]:
    """The class that writes event files.

    Raises:
        InputError: TensorBoard is not installed; the message names the extra.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("TensorBoard is not installed: pip install 'solov2[tensorboard]'") from error
    return SummaryWriter
