"""kill -9 at any stage, and the same command ends as if nothing had happened."""

import json
import os
import signal
import sys

import pytest
import torch
from helpers import QUICK
from hydra.core.global_hydra import GlobalHydra

from adq_train.cli.program import act
from adq_train.run.folder import RunFolder
from adq_train.sensitivity.partial import PartialTable
from adq_train.training.trainer import Trainer

COMMAND = ("adq-train", *QUICK, "pretrain.epochs=2", "trainer.epochs=2", "run_dir=run")


def run(folder, kill=None):
    """The exit code of the command in a process of its own, forked: it has nothing to import.

    Args:
        folder: Where it runs.
        kill: A class, its method, and before the how-manieth call of it the process kills itself.
    """
    folder.mkdir(exist_ok=True)
    GlobalHydra.instance().clear()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent are not there
            if kill:
                die_at(*kill)
            os.chdir(folder)
            sys.argv[:] = COMMAND
            code = act("adq-train")
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(owner, name, number):
    original, calls = getattr(owner, name), []

    def counting(*arguments, **more):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)

    setattr(owner, name, counting)


def outcome(folder):
    state = torch.load(folder / "run" / "checkpoints" / "last.pt", weights_only=True)
    result = json.loads((folder / "run" / "result.json").read_text())
    records = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name in ("seconds", "images_per_second", "data_wait_percent", "peak_memory_bytes"):
            del record[name]
    del result["seconds"], result["stamp"]  # which stands for the times too
    optimizers = [x["state"] for x in state["optimizer"]]  # of the weights, of the quantizers
    assert len(optimizers) == 2
    return state["model"], optimizers, result, records


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@pytest.mark.usefixtures("no_pictures")
def test_killed_in_every_stage_and_continued(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole) == 0

    steps = 4  # of an epoch
    for kill in (
        (Trainer, "step", steps + 3),
        (PartialTable, "append", 3),
        (RunFolder, "save", 2),  # the sensitivities are there, the bits are not
        (Trainer, "step", steps + 2),
    ):
        assert run(broken, kill) == -signal.SIGKILL, kill
    assert run(broken) == 0

    log = (broken / "run" / "train.log").read_text()
    for stage in ("pretrain: continuing after epoch 1", "profile: continuing after 2 layers"):
        assert stage in log
    assert "qat: continuing after epoch 1 of 2" in log
    for first, second in zip(outcome(whole), outcome(broken), strict=True):
        assert equal(first, second)
