"""When checkpoints are written, and that a training which goes on from one ends as a whole one."""

import os
import signal

import pytest
import torch
from training_helpers import Drawn, dense, grouped, same, trainer_of

from adq_train.interrupts import Interrupted, caught
from adq_train.training.average import WeightAverage
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.checkpointing import Checkpoints
from adq_train.training.hook import Hook
from adq_train.training.reestimation import ReestimateBatchNorm
from adq_train.training.schedule import Cosine


class Reports(Hook):
    """Keeps them, and stops after a number of epochs, before what follows."""

    def __init__(self, stop_after=None):
        self.kept, self.stop_after = [], stop_after

    def after_epoch(self, trainer, report):
        self.kept.append(report)
        if len(self.kept) == self.stop_after:
            raise KilledError


class KilledError(Exception):
    pass


def trainer(model, folder, epochs, *hooks, key="k", rhythm=None, stop_after=None, **settings):
    reports = Reports(stop_after)
    checkpoints = Checkpoints(CheckpointFolder(folder), key, **(rhythm or {}))
    found = trainer_of(
        model,
        *hooks,
        reports,
        checkpoints,
        optimizer=grouped(model),
        schedule=Cosine(),
        epochs=epochs,
        **settings,
    )
    return found, reports.kept


def run(*arguments, **settings):
    found, reports = trainer(*arguments, **settings)
    found.fit()
    return reports


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("averaged", [False, True])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, done, averaged):
    settings = {"precision": "fp16"} if averaged else {}

    def hooks(model):
        return [WeightAverage(model, 0.7), ReestimateBatchNorm(7)] if averaged else []

    whole = dense()
    reports = run(whole, tmp_path / "whole", 4, *hooks(whole), **settings)
    broken = dense()
    with pytest.raises(KilledError):  # before the checkpoint of this epoch
        run(broken, tmp_path / "broken", 4, *hooks(broken), stop_after=done + 1, **settings)
    torch.manual_seed(99)
    again = dense()
    rest = run(again, tmp_path / "broken", 4, *hooks(again), **settings)
    assert [x.epoch for x in rest] == list(range(done + 1, 5))
    for mine, other in zip(rest, reports[done:], strict=True):
        assert (mine.train_loss, mine.validation_loss) == (other.train_loss, other.validation_loss)
        assert (mine.step, mine.lr) == (other.step, other.lr)
        assert mine.validation_top1_percent == other.validation_top1_percent
    assert same(whole, again)


def test_the_seconds_of_an_earlier_process_count(tmp_path):
    first = run(dense(), tmp_path, 2)
    told = []
    model = dense()
    rest = run(model, tmp_path, 3, rhythm={"resumed": told.append})
    assert told == [first[-1].seconds]
    assert rest[0].seconds > told[0]


def test_a_checkpoint_of_another_run_is_not_used(tmp_path):
    run(dense(), tmp_path, 2, key="one")
    assert [x.epoch for x in run(dense(), tmp_path, 2, key="two")] == [1, 2]


def test_the_best_checkpoint_is_the_best_epoch_also_after_a_resume(tmp_path):
    tops = [x.validation_top1_percent for x in run(dense(), tmp_path / "whole", 5)]
    for done in range(1, 5):
        folder = tmp_path / str(done)
        with pytest.raises(KilledError):
            run(dense(), folder, 5, stop_after=done + 1)
        run(dense(), folder, 5)
        for name in ("whole", str(done)):
            best = CheckpointFolder(tmp_path / name).load("k", names=("best",))
            assert best["best_top1_percent"] == max(tops)
            assert best["epoch"] == tops.index(max(tops)) + 1
    assert tops.index(max(tops)) + 1 < 5  # so that a resume had to remember it


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 8, 12])
def test_a_signal_in_the_middle_of_an_epoch_costs_nothing(tmp_path, stop_after):
    """Three steps an epoch: within one, at its end, and after the last step of all."""
    whole = dense()
    reports = run(whole, tmp_path / "whole", 4)

    broken, calls = dense(), []
    after_step = broken.register_forward_hook(
        lambda module, *_: (module.training and calls.append(1))
        or (len(calls) == stop_after and os.kill(os.getpid(), signal.SIGTERM))
        or None
    )  # fmt: skip
    with pytest.raises(Interrupted), caught():
        run(broken, tmp_path / "broken", 4)
    after_step.remove()
    assert len(calls) == stop_after
    kept = CheckpointFolder(tmp_path / "broken").load("k")
    assert 3 * kept["epoch"] + kept["sums"]["batches"] == stop_after
    again = dense()
    rest = run(again, tmp_path / "broken", 4)
    for mine, other in zip(rest, reports[-len(rest) :], strict=True):
        assert (mine.train_loss, mine.validation_loss) == (other.train_loss, other.validation_loss)
        assert (mine.step, mine.lr, mine.epoch) == (other.step, other.lr, other.epoch)
    assert same(whole, again)


@pytest.fixture
def saved(monkeypatch):
    """Epoch and batches of each checkpoint."""
    found = []
    monkeypatch.setattr(
        CheckpointFolder,
        "save",
        lambda _, state, best: found.append((state["epoch"], state["sums"]["batches"])),
    )
    return found


def test_checkpoints_within_an_epoch_by_steps(tmp_path, saved):
    run(dense(), tmp_path, 2, rhythm={"steps": 2}, batches=Drawn(4, 4, 4, 4, 4))
    assert saved == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]


def test_checkpoints_by_the_clock(tmp_path, saved, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("adq_train.training.checkpointing.time.monotonic", lambda: now[0])

    class Clock(Hook):
        """Twelve seconds a step."""

        def after_batch(self, trainer):
            now[0] += 12

    batches = Drawn(4, 4, 4, 4, 4, 4)
    run(dense(), tmp_path, 2, Clock(), rhythm={"minutes": 0.5}, batches=batches)
    # After 36 s, and again; the last of an epoch is saved once. An epoch's end starts it anew.
    assert saved == [(0, 3), (1, 0), (1, 3), (2, 0)]
    saved.clear()
    run(dense(), tmp_path, 1, Clock(), batches=batches)
    assert saved == [(1, 0)]


def test_nothing_is_under_way_in_a_checkpoint(tmp_path, saved):
    seen = []

    class UnderWay(Hook):
        def flush(self, trainer):
            seen.append(("flush", trainer.sums.batches))

        def state_dict(self):
            seen.append(("state", trainer_.sums.batches))
            return {}

    trainer_, _ = trainer(dense(), tmp_path, 1, UnderWay(), rhythm={"steps": 2})
    trainer_.fit()
    assert seen == [("flush", 2), ("state", 2), ("flush", 3), ("state", 0)]
