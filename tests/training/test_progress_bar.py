"""What a person reads while a training goes."""

import itertools
import logging
import re

import pytest
from training_helpers import Drawn, dense, trainer_of

from adq_train.data.base import FirstBatches
from adq_train.progress import Progress
from adq_train.training.progress_bar import ProgressBar
from adq_train.training.throughput import duration
from adq_train.training.trainer import Sums


@pytest.fixture
def told(caplog, monkeypatch):
    # The command line, which other tests run in this process, keeps messages from the root logger.
    monkeypatch.setattr(logging.getLogger("adq_train"), "propagate", True)
    caplog.set_level("DEBUG", "adq_train")
    return caplog


def test_a_last_step_that_takes_what_is_left_over_is_said_once(told):
    trainer_of(dense(), ProgressBar("qat"), batches=Drawn(6, 7), epochs=2).fit()
    assert told.text.count("qat: the last step of an epoch takes 7 images: 1 left over") == 1
    told.clear()
    trainer_of(dense(), ProgressBar("qat"), batches=Drawn(6, 3), epochs=2).fit()
    assert "left over" not in told.text


def test_a_dry_run_begins_with_the_last_step_and_says_nothing_of_it(told):
    some = FirstBatches(Drawn(6, 3), 2, last_first=True)
    assert some.size(1) > some.size(0)  # as if the last one took more than the others
    trainer_of(dense(), ProgressBar("qat"), batches=some, epochs=1).fit()
    assert "left over" not in told.text


def test_nothing_is_said_of_steps_that_are_done(told):
    trainer = trainer_of(dense(), ProgressBar("qat"), batches=Drawn(6, 7), epochs=2)
    trainer.epoch = 2
    trainer.fit()
    assert "left over" not in told.text


def test_every_epoch_is_told_with_its_figures(told):
    trainer_of(dense(), ProgressBar("qat"), epochs=2).fit()
    lines = [x.getMessage().strip() for x in told.records]
    assert [x.split(":")[0] for x in lines] == ["qat 1/2", "qat 2/2"]
    told = r"loss \d\.\d{3}, validation \d+\.\d %, \d+ s left, \d+ images/s"
    assert all(re.search(told, x) for x in lines)
    assert ", 0 s left, " in lines[-1]


@pytest.mark.parametrize("batches", [0, 2])
def test_the_time_left_is_judged_by_the_steps_of_this_process(told, monkeypatch, batches):
    trainer = trainer_of(dense(), ProgressBar("qat"), batches=Drawn(2, 2, 2, 2), epochs=3)
    trainer.epoch, trainer.seconds = 1, 1e6  # an earlier process, on a slow machine
    trainer.sums = Sums(batches=batches)
    clock = itertools.count(0, 100)
    monkeypatch.setattr("adq_train.training.trainer.time.perf_counter", lambda: next(clock))
    bar = []
    monkeypatch.setattr(
        Progress, "advance", lambda self, text, more: bar.append((trainer.seconds, text))
    )
    trainer.fit()
    (spent, first), _ = bar
    steps = 4 - batches
    assert f", {duration((spent - 1e6) / steps * 4)} left" in first


def test_the_bar_moves_within_an_epoch(monkeypatch):
    shares = []
    monkeypatch.setattr(Progress, "within", lambda self, share: shares.append(share))
    trainer_of(dense(), ProgressBar("qat"), batches=Drawn(2, 2, 2, 2), epochs=1).fit()
    assert shares == [0.25, 0.5, 0.75, 1]
