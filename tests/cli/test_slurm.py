"""Jobs of a sweep by submitit: in this process, in others, and as a cluster would get them."""

import os

import pytest
import yaml
from helpers import QUICK

from adq_train.cli import slurm
from adq_train.cli.jobs import Job, Outcome
from adq_train.errors import UserError

submitit = pytest.importorskip("submitit", reason="needs adq-train[slurm]")

SETTINGS = {"folder": "submitit/%j", "max_num_timeout": 3, "slurm_partition": "gpu"}
JOBS = [Job((f"seed={seed}",), seed + 1, None, ("adq-train", "-m", "seed=0,1")) for seed in (0, 1)]


def test_a_sweep_goes_on_and_says_what_failed(cli, tmp_path, monkeypatch):
    seen = []

    def run(cfg, experiment, overrides, command, ranks):
        seen.append((cfg.seed, experiment, overrides, command))
        if cfg.seed == 1:
            raise UserError("budget: cannot be met")

    monkeypatch.setattr("adq_train.run.pipeline.run", run)
    launcher = ["hydra/launcher=slurm", "hydra.launcher.cluster=debug", "output_root=here"]
    outcome = cli("-m", "experiment=quickstart", *launcher, "seed=1,2")
    assert outcome.code == 1
    overrides = ["experiment=quickstart", "output_root=here", "seed=2"]
    assert [seed for seed, *_ in seen] == [1, 2]
    assert seen[1] == (2, "quickstart", overrides, ["adq-train", *overrides])
    assert "1 of 2 runs are done" in outcome.err
    failed = "experiment=quickstart output_root=here seed=1\n        budget: cannot be met\n"
    assert f"failed: {failed}" in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"here"}


def test_a_single_run_goes_there_too(cli, monkeypatch):
    monkeypatch.setattr("adq_train.run.pipeline.run", lambda *_: None)
    outcome = cli("hydra/launcher=slurm", "hydra.launcher.cluster=debug", "seed=1")
    assert outcome.code == 0
    assert "runs are done" not in outcome.err


def test_the_launcher_s_settings(cli):
    outcome = cli("--cfg", "hydra", "hydra/launcher=slurm", "hydra.launcher.slurm_partition=gpu")
    launcher = yaml.safe_load(outcome.out)["hydra"]["launcher"]
    assert (launcher["slurm_partition"], launcher["gpus_per_node"]) == ("gpu", 1)
    outcome = cli("hydra/launcher=submitit_local", "seed=1")
    assert outcome.code == 2
    assert "hydra/launcher: must be basic or slurm, got 'submitit_local'" in outcome.err


def test_what_submitit_refuses_is_one_line(cli, monkeypatch):
    refused = cli("hydra/launcher=slurm", "+hydra.launcher.colour=red", "seed=1")
    assert refused.code == 1
    assert "error: hydra.launcher: submitit cannot submit the jobs: " in refused.err
    monkeypatch.setattr("importlib.import_module", missing)
    refused = cli("-m", "hydra/launcher=slurm", "seed=0,1")
    assert "hydra/launcher: slurm needs pip install 'adq-train[slurm]'" in refused.err


IMPORT = __import__("importlib").import_module


def missing(name):
    if name == "submitit":
        raise ImportError(name)
    return IMPORT(name)


def test_a_cluster_gets_one_array_of_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun"):
        (programs / name).write_text('#!/bin/sh\ncp "$1" script\necho Submitted batch job 12\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    jobs = slurm.submit(
        JOBS, {**SETTINGS, "cluster": "slurm", "gpus_per_node": 1, "timeout_min": 30}
    )
    assert [x.job_id for x in jobs] == ["12_0", "12_1"]
    script = (tmp_path / "script").read_text()
    for line in ("array=0-1%2", "partition=gpu", "gpus-per-node=1", "time=30"):
        assert f"#SBATCH --{line}\n" in script
    again = jobs[1].submission()
    assert again.function == JOBS[1]
    # What submitit does where the time is over: the same job once more.
    assert JOBS[1].checkpoint().function == JOBS[1]


class Handle:
    """Of a job whose process has ended, or is gone."""

    def __init__(self, outcome):
        self.outcome = outcome

    def result(self):
        if self.outcome is None:
            raise RuntimeError("the node\nis gone")
        return self.outcome


def test_a_process_that_dies_is_a_job_that_failed(monkeypatch):
    done = Outcome("seed=1", 0)
    monkeypatch.setattr(slurm, "submit", lambda *_: [Handle(None), Handle(done)])
    first, second = slurm.run_elsewhere(JOBS, SETTINGS)
    assert second == done
    reason = "its process ended without an outcome: the node is gone"
    assert first == Outcome("seed=0", 1, reason)


@pytest.mark.slow
def test_a_sweep_in_processes_of_their_own(cli, tmp_path):
    sweep = (
        "-m",
        *QUICK,
        "hydra/launcher=slurm",
        "hydra.launcher.cluster=local",
        "hydra.launcher.folder=submitit/%j",
        "budget.average_weight_bits=1.5,2.5",
    )
    outcome = cli(*sweep)
    assert outcome.code == 1
    assert "1 of 2 runs are done" in outcome.err
    assert "1.5 cannot be reached" in outcome.err
    assert {x.name for x in tmp_path.iterdir()} == {"outputs", "submitit"}
