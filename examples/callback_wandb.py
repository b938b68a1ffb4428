"""Send the figures of a run to Weights & Biases.

    pip install wandb
    WANDB_MODE=offline python examples/callback_wandb.py quickstart

Offline, no account is needed, and the figures are written to ./wandb.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import wandb

import solov2


class WandbCallback:
    """Opens a run of Weights & Biases with the row "start", logs all numbers, and closes it with the row "end"."""

    def __init__(self, project: str, name: str | None = None) -> None:
        self.project, self.name = project, name

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Receive a row of the log."""
        if row["kind"] == "start":
            self.run = wandb.init(project=self.project, name=self.name, config=dict(row))
        elif row["kind"] == "end":
            self.run.finish(exit_code=0 if row["error"] is None else 1)
        elif "step" in row:
            numbers = {
                f"{row['kind']}/{name}": value
                for name, value in row.items()
                if isinstance(value, (int, float)) and name not in ("time", "step")
            }
            self.run.log(numbers, step=row["step"])


if __name__ == "__main__":
    solov2.train(sys.argv[1], callbacks=[WandbCallback("solov2", sys.argv[1])])
