"""MLflow: where ``MLFLOW_TRACKING_URI`` says, or in ``mlflow.db`` and ``mlruns`` beside the run."""

from __future__ import annotations

import os
import time
from pathlib import Path

from adq_train.errors import UserError
from adq_train.reporting.loggers import Logger, Outcome, Record, kept_id, plain, require, scalars

EXPERIMENT = "adq-train"


class MlflowLogger(Logger):
    """One MLflow run per run's folder; ``MLFLOW_EXPERIMENT_NAME`` names the experiment."""

    def __init__(self, folder: Path, stage: str, done: int, before: int) -> None:
        super().__init__(folder, stage, done, before)
        require("mlflow")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self.metric = Metric
        place = f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = kept_id(folder, "mlflow")
        try:
            self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", place))
            experiment = self.client.get_experiment_by_name(name)
            if experiment:
                number = experiment.experiment_id
            else:
                own = "MLFLOW_TRACKING_URI" not in os.environ
                beside = (folder.resolve().parent / "mlruns").as_uri() if own else None
                number = self.client.create_experiment(name, artifact_location=beside)
            if known is None:
                run = self.client.create_run(number, run_name=folder.name)
                known = kept_id(folder, "mlflow", run.info.run_id)
                self.is_new = True
        except Exception as error:  # of the server, the network or the file
            raise UserError(
                f"logger: mlflow does not start ({error}); see MLFLOW_TRACKING_URI"
            ) from error
        self.run: str = known or ""

    def epoch(self, record: Record) -> None:
        """The figures of an epoch."""
        now, step = int(time.time() * 1000), self.step(record["epoch"])
        metrics = [self.metric(tag, value, now, step) for tag, value in scalars(record).items()]
        for start in range(0, len(metrics), 500):
            self.client.log_batch(self.run, metrics[start : start + 500])

    def outcome(self, outcome: Outcome) -> None:
        """Parameters, final metrics and pictures."""
        for name, value in plain(outcome).items():
            # Its names have no brackets and its texts 6,000 characters.
            key = name.replace("[", ".").replace("]", "")
            self.client.log_param(self.run, key, str(value)[:6000])
        for name, value in outcome.figures.items():
            self.client.log_metric(self.run, name, value)
        for path in outcome.pictures.values():
            self.client.log_artifact(self.run, str(path))

    def close(self) -> None:
        """Marks the run as finished; the next stage goes on with it."""
        self.client.set_terminated(self.run)
