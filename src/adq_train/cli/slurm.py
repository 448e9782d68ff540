"""The jobs of a sweep in processes of their own, on a Slurm cluster, by submitit."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from adq_train.cli.jobs import Job, Outcome
from adq_train.errors import UserError


def run_elsewhere(jobs: Sequence[Job], launcher: Mapping[str, Any]) -> list[Outcome]:
    """Submits the jobs, waits for them, and says how each ended.

    Args:
        jobs: Of the sweep.
        launcher: ``cluster``, ``folder``, ``max_num_timeout``, and what else submitit's
            ``AutoExecutor.update_parameters`` takes.

    Raises:
        UserError: Submitit or the cluster refuses them.
    """
    return [_outcome(job, handle) for job, handle in zip(jobs, submit(jobs, launcher), strict=True)]


def submit(jobs: Sequence[Job], launcher: Mapping[str, Any]) -> list[Any]:
    """The same without waiting: submitit's jobs."""
    try:
        submitit = importlib.import_module("submitit")
    except ImportError as error:
        raise UserError("hydra/launcher: slurm needs pip install 'adq-train[slurm]'") from error
    parameters = dict(launcher)
    cluster, folder = parameters.pop("cluster"), parameters.pop("folder")
    timeouts = {f"{cluster}_max_num_timeout": parameters.pop("max_num_timeout")}
    try:
        executor = submitit.AutoExecutor(
            folder, cluster, **(timeouts if cluster in ("slurm", "local") else {})
        )
        executor.update_parameters(**parameters)
        with executor.batch():  # one array of jobs
            return [executor.submit(job) for job in jobs]
    except (AssertionError, NameError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"hydra.launcher: submitit cannot submit the jobs: {reason}") from error


def _outcome(job: Job, handle: Any) -> Outcome:
    """How a job ended, also where its process did not live to tell."""
    try:
        outcome: Outcome = handle.result()
    except Exception as error:  # the job's machine may fail in any way
        reason = " ".join(str(error).split())
        return Outcome(job.name, 1, f"its process ended without an outcome: {reason}")
    return outcome
