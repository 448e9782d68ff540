"""Whole runs by two processes, through the command line of each."""

import contextlib
import io
import json
import os
import signal
import sys

import pytest
import torch
from helpers import QUICK
from hydra.core.global_hydra import GlobalHydra
from ranks_helpers import run_ranks

from adq_train.cli.program import act

pytestmark = pytest.mark.usefixtures("no_pictures")

SETTINGS = (
    *QUICK,
    "trainer.batch_size=37",
    "trainer.eval_batch_size=10",
    "trainer.check_ranks=true",
    "run_dir=run",
)


def run(folder, processes, *more, before=lambda: None):
    """Exit code, output and messages of each process."""
    folder.mkdir(exist_ok=True)

    def one():
        os.chdir(folder)
        sys.argv = ["adq-train", *SETTINGS, *more]
        GlobalHydra.instance().clear()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            before()
            leave, os._exit = os._exit, sys.exit
            code = act("adq-train")
            os._exit = leave
        return code, out.getvalue(), err.getvalue()

    results = run_ranks(processes, one)
    assert all(isinstance(x, tuple) for x in results), results
    return results


def weights(folder):
    return torch.load(folder / "run" / "checkpoints" / "last.pt", weights_only=True)["model"]


def test_a_run_and_its_resume(tmp_path):
    processes = 2
    whole = run(tmp_path / "whole", processes)
    assert [code for code, *_ in whole] == [0] * processes, whole[0][2]
    assert "Top-1 accuracy on 64 test images" in whole[0][1]
    assert [(out, err) for _, out, err in whole[1:]] == [("", "")] * (processes - 1)
    folder = tmp_path / "whole" / "run"
    result = json.loads((folder / "result.json").read_text())
    assert result["num_test_images"] == 64
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["processes"] == processes
    assert manifest["command"][:2] == ["torchrun", f"--nproc-per-node={processes}"]

    def stop_in_the_middle():
        from adq_train.training.trainer import Trainer

        call, calls = Trainer.step, []

        def counting(self, *arguments):
            calls.append(1)
            if len(calls) == 10 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return call(self, *arguments)

        Trainer.step = counting  # in a forked process, so for nobody else

    stopped = run(tmp_path / "broken", processes, before=stop_in_the_middle)
    assert [code for code, *_ in stopped] == [128 + signal.SIGTERM] * processes
    assert "stopped by SIGTERM; what is done is kept, continue with" in stopped[0][2]
    assert f"torchrun --nproc-per-node={processes} -m adq_train" in stopped[0][2]
    assert [(out, err) for _, out, err in stopped[1:]] == [("", "")] * (processes - 1)
    again = run(tmp_path / "broken", processes)
    assert "qat: continuing after epoch 0 of 1, 3 steps of the next" in again[0][2]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("sensitivity.json", "allocation.json", "levels.json"):
        texts = [(tmp_path / x / "run" / name).read_text() for x in ("whole", "broken")]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["trainer.epoch=1"], "trainer.epoch: there is no such setting"),
        (["budget.average_weight_bits=1.5"], "budget.average_weight_bits: 1.5 cannot be reached"),
        (["trainer.batch_size=1"], "trainer.batch_size: 1 images cannot be shared by 2 processes"),
        (["seed=0,1", "-m"], "a sweep runs one job after the other"),
    ],
    ids=["command line", "stage", "batch", "sweep"],
)
def test_an_error_of_all_is_told_once(tmp_path, more, message):
    results = run(tmp_path / "run", 2, *more)
    assert all(code for code, *_ in results)
    told = "".join(err for *_, err in results)
    assert told.count(message) >= 1
    assert told.count("error") == (2 if "-m" in more else 1), told
    assert list((tmp_path / "run").iterdir()) == []


def test_the_lock_of_another_run_ends_all(tmp_path):
    import fcntl

    folder = tmp_path / "run"
    (folder / "run").mkdir(parents=True)
    lock = os.open(folder / "run" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    results = run(folder, 2)
    os.close(lock)
    assert [code for code, *_ in results] == [1, 1]
    told = "".join(err for *_, err in results)
    assert told.count("error") == 1
    assert "another process is writing to run" in told
