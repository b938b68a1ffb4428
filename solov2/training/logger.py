"""The log of a run: one JSON object per line for machines, a progress bar or plain lines for people."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm


class Meter:
    """Losses and throughput of the steps since the last reading; losses stay on the device until then."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._reset()

    def _reset(self) -> None:
        self._losses: list[dict[str, Tensor]] = []
        self._images, self._started = 0, time.perf_counter()

    def add(self, losses: dict[str, Tensor], *, images: int) -> None:
        """One optimizer step: its losses (scalars on any device) and how many images this process saw in it."""
        self._losses.append(losses)
        self._images += images

    def read(self) -> tuple[dict[str, float], float]:
        """Figures of the steps since the last reading, and seconds per step.

        The figures are the mean losses, their sum as "loss", and images_per_second of all processes. Losses that are
        not finite are left out of the means. Waits for the device.
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


class RunLogger:
    """Writes `log.jsonl` (and TensorBoard, by option) and shows progress; every method is silent unless `main`.

    Args:
        folder: run folder, exists.
        main: whether this process speaks.
        tensorboard: also write event files (needs the extra `tensorboard`).

    Raises:
        ImportError: tensorboard is wanted but not installed; the sentence names the extra.
    """

    def __init__(self, folder: str | Path, *, main: bool, tensorboard: bool = False) -> None:
        self.main = main
        self._file = open(Path(folder) / "log.jsonl", "a", encoding="utf-8") if main else None
        self._bar: tqdm | None = None
        self._events = None
        if main and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoard is not installed: pip install 'solov2[tensorboard]'") from error
            self._events = SummaryWriter(str(folder))

    def say(self, text: str) -> None:
        """Print a line for people."""
        if self.main:
            with self._outliving_the_terminal():
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def warn(self, text: str, step: int | None = None) -> None:
        """A warning for people and machines."""
        self.write("warning", step, text=text)
        self.say(f"warning: {text}")

    def write(self, kind: str, step: int | None = None, **values: Any) -> None:
        """Append {"kind", "time", "step", **values} to log.jsonl; numbers go to TensorBoard too."""
        if self._file is None:
            return
        row = {"kind": kind, "time": round(time.time(), 3)} | ({} if step is None else {"step": step}) | values
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None and step is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def start_epoch(self, epoch: int, steps: int, *, done: int = 0) -> None:
        """Open the progress bar of an epoch, on a terminal only; `done` of its steps were done before."""
        if self.main and sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=done, desc=f"epoch {epoch}", unit="step", leave=False, dynamic_ncols=True
            )

    def advance(self) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            with self._outliving_the_terminal():
                self._bar.update()

    def train(
        self, step: int, *, epoch: int, total_steps: int, seconds_left: float, skipped: int = 0, **values: float
    ) -> None:
        """Figures of the last steps: into log.jsonl, and onto the bar or a plain line.

        `skipped` is the number of steps so far that were not finite.
        """
        if not self.main:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.write("train", step, epoch=epoch, skipped=skipped, **finite)
        text = (
            f"loss {values['loss']:.3f} (category {values['loss_category']:.3f}, mask {values['loss_mask']:.3f})  "
            f"{values['images_per_second']:.1f} images/s  lr {values['learning_rate']:.2e}  "
            f"left {format_seconds(seconds_left)}{f'  skipped {skipped}' if skipped else ''}"
        )
        if self._bar is not None:
            with self._outliving_the_terminal():
                self._bar.set_postfix_str(text)
        else:
            self.say(f"epoch {epoch}  step {step}/{total_steps}  {text}")

    def end_epoch(self) -> None:
        """Close the bar of the epoch."""
        if self._bar is not None:
            with self._outliving_the_terminal():
                self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def _outliving_the_terminal(self) -> Iterator[None]:
        """A run goes on where nobody can read it: a closed terminal, a broken pipe. log.jsonl has it all."""
        try:
            yield
        except OSError:
            self._bar = None

    def close(self) -> None:
        """Close all files."""
        self.end_epoch()
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def format_seconds(seconds: float) -> str:
    """'1:02:03', or '2:03' under an hour."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
