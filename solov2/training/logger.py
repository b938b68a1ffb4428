"""The log of a run: JSON lines in `log.jsonl`, and a progress bar or plain lines on the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from solov2.errors import printable
from solov2.training.callbacks import Callback, Callbacks

LOG = logging.getLogger(__name__)
LOSSES = ("loss", "loss_category", "loss_mask")  # of every model; others may follow


class Meter:
    """Mean losses and throughput since the last `read`; losses stay on the device until then."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._reset()

    def _reset(self) -> None:
        self._losses: list[dict[str, Tensor]] = []
        self._images, self._started = 0, time.perf_counter()

    def add(self, losses: dict[str, Tensor], *, images: int) -> None:
        """Add an optimizer step: its losses (scalars on any device) and the number of images in this process."""
        self._losses.append(losses)
        self._images += images

    def read(self) -> tuple[dict[str, float], float]:
        """Figures of the steps since the last call, and seconds per step. Waits for the device.

        The figures are the mean losses, their sum as "loss", and images_per_second over all processes. The means
        exclude non-finite losses.
        """
        names = list(self._losses[0])
        values = torch.stack([torch.stack([losses[name] for name in names]) for losses in self._losses])
        means = values.where(values.isfinite(), math.nan).nanmean(0).tolist()
        seconds = time.perf_counter() - self._started
        figures = {"loss": sum(means), **dict(zip(names, means, strict=True))}
        figures["images_per_second"] = self._images * self.processes / seconds
        steps = len(self._losses)
        self._reset()
        return figures, seconds / steps


class EpochMeter:
    """Mean losses and throughput of an epoch, or of the part of it since the last resume."""

    def __init__(self, first_step: int) -> None:
        """`first_step` is the number of steps of the run completed so far."""
        self.first_step = self.step = first_step
        self.learning_rate = 0.0
        self._started = time.perf_counter()
        self._sums, self._counts = dict.fromkeys(LOSSES, 0.0), dict.fromkeys(LOSSES, 0)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the mean losses of the steps since the last call, up to the global `step`; ignores non-finite ones."""
        for name in [name for name in values if name.startswith("loss")]:
            finite = math.isfinite(values[name])
            self._sums[name] = self._sums.get(name, 0.0) + (step - self.step) * (values[name] if finite else 0.0)
            self._counts[name] = self._counts.get(name, 0) + (step - self.step) * finite
        self.step, self.learning_rate = step, values["learning_rate"]

    def read(self, images_per_step: int) -> dict[str, float | None]:
        """The mean losses (None if none was finite), images_per_second, learning_rate and seconds."""
        seconds = time.perf_counter() - self._started
        means = {name: self._sums[name] / count if count else None for name, count in self._counts.items()}
        rate = images_per_step * (self.step - self.first_step) / seconds
        return {**means, "images_per_second": rate, "learning_rate": self.learning_rate, "seconds": seconds}


class RunLogger:
    """Writes `log.jsonl`, hands its rows to callbacks, and shows progress. Does nothing unless `main`.

    Until `close`, warnings of the logger `solov2` are also written to `log.jsonl`. As a context manager, it writes a
    last row of kind "end".

    Args:
        folder: run folder; must exist.
        main: whether this process writes and prints.
        callbacks: receive each row that is written.
    """

    def __init__(self, folder: str | Path, *, main: bool, callbacks: Sequence[Callback] = ()) -> None:
        self.main = main
        path = Path(folder) / "log.jsonl"
        self.earlier_seconds = start_durations(path) if main else []
        self._file = _open_log(path) if main else None
        self._warnings = _WarningRows(self)
        logging.getLogger("solov2").addHandler(self._warnings)
        self._bar: tqdm | None = None
        self._epoch: EpochMeter | None = None
        self.callbacks = Callbacks(callbacks if main else ())
        self._lock = threading.RLock()  # callbacks warn in their own thread

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.write("end", error=None if error is None else str(error) or type(error).__name__)
        self.close()

    def print(self, text: str) -> None:
        """Print a line, or the lines of a table, on stdout."""
        if self.main and sys.stdout is not None:  # pythonw has none
            encoding = getattr(sys.stdout, "encoding", None)
            with self._ignore_closed_terminal():
                tqdm.write("\n".join(printable(line, encoding=encoding) for line in text.split("\n")), file=sys.stdout)
                sys.stdout.flush()

    def warn(self, text: str, step: int | None = None) -> None:
        """Log a warning, which also goes to log.jsonl."""
        if self.main:
            LOG.warning(text, extra={"step": step})

    def write(self, kind: str, step: int | None = None, **values: Any) -> None:
        """Append {"kind", "time", "step", **values} to log.jsonl, and hand it to the callbacks."""
        if self._file is None:
            return
        row = {"kind": kind, "time": round(time.time(), 3)} | ({} if step is None else {"step": step}) | values
        with self._lock:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self.callbacks(row)

    def start_epoch(self, epoch: int, steps: int, *, done: int = 0) -> None:
        """Start an epoch (1-based) with `done` of its `steps` completed, and on a terminal its progress bar."""
        self._epoch = EpochMeter((epoch - 1) * steps + done)
        if self.main and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=done, desc=f"epoch {epoch}", unit="step", leave=False, dynamic_ncols=True
            )

    def advance(self) -> None:
        """Advance the progress bar by one optimizer step."""
        if self._bar is not None:
            with self._ignore_closed_terminal():
                self._bar.update()

    def train(
        self, step: int, *, epoch: int, total_steps: int, seconds_left: float, skipped: int = 0, **values: float
    ) -> None:
        """Write the figures of the last steps to log.jsonl, and show them on the progress bar or as a line.

        `skipped` is the number of non-finite steps so far.
        """
        if not self.main:
            return
        if self._epoch is not None:
            self._epoch.add(step, values)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.write("train", step, epoch=epoch, skipped=skipped, **finite)
        skips = f"  skipped {skipped}" if skipped else ""
        text = f"{_figures_text(values)}  left {format_seconds(seconds_left)}{skips}"
        if self._bar is not None:
            with self._ignore_closed_terminal():
                self._bar.set_postfix_str(text)
        else:
            self.print(f"epoch {epoch}  step {step}/{total_steps}  {text}")

    def end_epoch(self, epoch: int, *, images_per_step: int) -> dict[str, float | None]:
        """Close the progress bar, write the means of an epoch (1-based) to log.jsonl and return them.

        Returns {} if no epoch was started.
        """
        self._close_bar()
        if self._epoch is None:
            return {}
        figures, step = self._epoch.read(images_per_step), self._epoch.step
        self._epoch = None
        self.write("epoch", step, epoch=epoch, **figures)
        return figures

    def show_epoch(self, epoch: int, epochs: int, figures: Mapping[str, Any], evaluation: str) -> None:
        """Print the summary line of an epoch.

        Args:
            epoch: 1-based.
            epochs: number of epochs of the run.
            figures: returned by `end_epoch`; empty for an epoch that ended before a resume.
            evaluation: text with the AP or PQ of the epoch; empty if it was not evaluated.
        """
        means = [_figures_text(figures), f"in {format_seconds(figures['seconds'])}"] if figures else []
        if means or evaluation:
            self.print("  ".join([f"epoch {epoch}/{epochs}", *means, *([evaluation] if evaluation else [])]))

    def _close_bar(self) -> None:
        if self._bar is not None:
            with self._ignore_closed_terminal():
                self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def _ignore_closed_terminal(self) -> Iterator[None]:
        """Let the run continue if its terminal was closed or its pipe is broken; log.jsonl has everything."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._bar = None

    def close(self) -> None:
        """Close all files."""
        self._close_bar()
        self.callbacks.close()
        logging.getLogger("solov2").removeHandler(self._warnings)
        if self._file is not None:
            self._file.close()


class _WarningRows(logging.Handler):
    """Writes the warnings of the library to the log of a run."""

    def __init__(self, logger: RunLogger) -> None:
        super().__init__(logging.WARNING)
        self.logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        self.logger.write("warning", getattr(record, "step", None), text=record.getMessage())


def start_durations(path: Path) -> list[float]:
    """Seconds that each earlier start of a run lasted, from its row "start" in log.jsonl to its last row.

    Truncated lines, left by a process that was killed, are skipped.
    """
    durations: list[float] = []
    first = 0.0
    for row in _rows(path):
        if row["kind"] == "start":
            durations.append(0.0)
            first = row["time"]
        elif durations:
            durations[-1] = max(durations[-1], row["time"] - first)
    return durations


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "kind" in row and isinstance(row.get("time"), (int, float)):
                yield row


def _open_log(path: Path) -> TextIO:
    """Open the log for appending; a truncated last line, left by a process that was killed, is ended first."""
    truncated = False
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            file.seek(-1, 2)
            truncated = file.read() != b"\n"
    log = open(path, "a", encoding="utf-8")
    if truncated:
        log.write("\n")
    return log


def _figures_text(values: Mapping[str, Any]) -> str:
    losses = {
        name.removeprefix("loss_"): "-" if value is None else f"{value:.3f}"
        for name, value in values.items()
        if name.startswith("loss")
    }
    parts = ", ".join(f"{name} {text}" for name, text in losses.items() if name != "loss")
    rate = f"{values['images_per_second']:.1f} images/s  lr {values['learning_rate']:.2e}"
    return f"loss {losses['loss']} ({parts})  {rate}"


def format_seconds(seconds: float) -> str:
    """'1:02:03', or '2:03' under an hour."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
