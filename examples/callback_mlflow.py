"""Record the figures of a run with MLflow, in a folder, a database or on a server.

    pip install mlflow-skinny
    MLFLOW_ALLOW_FILE_STORE=true python examples/callback_mlflow.py quickstart mlruns

A database (sqlite:///mlflow.db) needs the whole of MLflow: pip install mlflow.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mlflow.tracking import MlflowClient

import solov2


class MlflowCallback:
    """Creates a run of MLflow with the row "start", logs all numbers, and ends it with the row "end"."""

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        self.client, self.experiment = MlflowClient(tracking_uri), experiment

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Receive a row of the log."""
        if row["kind"] == "start":
            known = self.client.get_experiment_by_name(self.experiment)
            experiment = known.experiment_id if known else self.client.create_experiment(self.experiment)
            self.run = self.client.create_run(experiment).info.run_id
            for name, value in row.items():
                self.client.log_param(self.run, name, value)
        elif row["kind"] == "end":
            self.client.set_terminated(self.run, "FINISHED" if row["error"] is None else "FAILED")
        elif "step" in row:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("time", "step"):
                    self.client.log_metric(self.run, f"{row['kind']}/{name}", value, step=row["step"])


if __name__ == "__main__":
    solov2.train(sys.argv[1], callbacks=[MlflowCallback(sys.argv[2], "solov2")])
