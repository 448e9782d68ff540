"""What every test may use: the command line, run inside this process."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import QUICK
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure
from omegaconf import DictConfig

from adq_train.cli.jobs import Job, run_job
from adq_train.cli.program import act

# Tests that run side by side, each with a thread for every core, would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whole runs and kills take long: started first, they do not keep one process busy at the end.
FIRST = (
    "test_init_from.py",
    "test_several_processes.py",
    "test_wheel.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long tests first; the order is otherwise as it was."""
    items.sort(key=lambda item: item.path.name not in FIRST)


class Outcome(NamedTuple):
    """Exit code and outputs of one command."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@contextlib.contextmanager
def kept_logger() -> Iterator[None]:
    """Takes back what a command line run does to the logger of the package."""
    logger = logging.getLogger("adq_train")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def same_logger() -> Iterator[None]:
    """Every test finds the logger of the package as the first one did."""
    with kept_logger():
        yield


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a program (``adq-eval``) with some arguments in this process."""

    def run(name: str, *arguments: object) -> Outcome:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = act(name)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def cli(program: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Runs ``adq-train`` with the given arguments in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(program, "adq-train")


@functools.cache
def composed(overrides: tuple[str, ...]) -> DictConfig:
    """The configuration of a job; most jobs of a test differ in their folder alone."""
    return Job(overrides, 0, None, ()).configuration()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs one configuration as ``adq-train`` does, without its command line, as :func:`cli`."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> Outcome:
        capsys.readouterr()
        own = Job(overrides, 0, None, ("adq-train", *overrides))
        outcome = run_job(own, copy.deepcopy(composed(overrides)))
        return Outcome(outcome.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder in which a short run, ``run``, was made, and what it printed; not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    out, err = io.StringIO(), io.StringIO()
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch, kept_logger():
        patch.chdir(root)
        patch.setattr(sys, "argv", ["adq-train", *QUICK, "run_dir=run"])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = act("adq-train")
    return root, Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def finished(finished_once: tuple[Path, Outcome], tmp_path: Path) -> tuple[Outcome, Path]:
    """What that run printed, and a copy of its folder, beside a copy of the float model."""
    root, outcome = finished_once
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return outcome, tmp_path / "run"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the pictures of a run, most of a short run's time."""
    monkeypatch.setattr("adq_train.run.pipeline.report.write", lambda *_: None)
    monkeypatch.setattr("adq_train.reporting.plots.weights_and_levels", lambda *_: Figure((1, 1)))


@pytest.fixture(scope="session")
def finished_run(
    finished_once: tuple[Path, Outcome], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run of a few seconds."""
    folder = tmp_path_factory.mktemp("run") / "run=1,of=few"  # runs are named by their settings
    shutil.copytree(finished_once[0] / "run", folder)
    return folder
