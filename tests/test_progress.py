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
