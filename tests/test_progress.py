"""What a terminal and what a file get to see."""

import io
import logging
import sys

import pytest

from adq_train import progress
from adq_train.progress import Progress


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def show(monkeypatch, caplog):
    """Runs three steps, the second one eleven seconds after the first."""

    def run(terminal):
        times = iter([0.0, 1.0, 12.0, 12.0, 13.0])
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
        screen = Screen(terminal)
        monkeypatch.setattr(sys, "stderr", screen)
        # The command line, which other tests run in this process, takes its messages for itself.
        monkeypatch.setattr(logging.getLogger("adq_train"), "handlers", [])
        monkeypatch.setattr(logging.getLogger("adq_train"), "propagate", True)
        with caplog.at_level(logging.DEBUG, logger="adq_train"), Progress("qat", 5, 1) as steps:
            for loss in "abc":
                steps.advance(f"loss {loss}")
        monkeypatch.undo()
        return screen.getvalue(), [(r.levelname, r.getMessage()) for r in caplog.records]

    return run


def test_without_a_terminal_a_line_comes_now_and_then_and_the_log_has_all(show):
    screen, records = show(terminal=False)
    assert screen == ""
    assert records == [
        ("DEBUG", "  qat 2/5: loss a"),
        ("INFO", "  qat 3/5: loss b"),
        ("DEBUG", "  qat 4/5: loss c"),
    ]


def test_a_terminal_shows_a_bar_alone(show):
    screen, records = show(terminal=True)
    assert "qat" in screen
    assert "1/5" in screen
    assert {level for level, _ in records} == {"DEBUG"}
    assert len(records) == 3


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_bar_fits_into_eighty_columns_and_any_encoding(monkeypatch, encoding):
    raw = io.BytesIO()
    screen = io.TextIOWrapper(raw, encoding=encoding)
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_FRAMES", 0)
    with Progress("pretrain", 200) as steps:
        steps.within(0.5)
        steps.advance("loss 1.958, validation 100.0 %, 59 min left", " and much more" * 9)
    screen.flush()
    frames = raw.getvalue().decode(encoding).split("\r")
    assert max(map(len, frames)) <= 80
    assert any("pretrain   0/200 |" in x for x in frames)
    assert any(
        "1/200" in x and "| loss 1.958, validation 100.0 %, 59 min left" in x for x in frames
    )


def test_a_long_epoch_is_told_of_without_a_terminal(monkeypatch, caplog):
    times = iter([0.0, 25.0, 31.0, 32.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(sys, "stderr", Screen(False))
    with caplog.at_level(logging.DEBUG, logger="adq_train"), Progress("qat", 5, 1) as steps:
        for share in (0.2, 0.4, 0.6):
            steps.within(share)
    monkeypatch.undo()
    assert [x.getMessage() for x in caplog.records] == ["  qat: 40 % of epoch 2 of 5"]
