"""Progress: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

from adq_train.messages import speaks

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_SILENCE = 30.0  # within an epoch that is longer than that
SECONDS_BETWEEN_FRAMES = 0.2
FORMAT = "  {desc} |{bar:14}| {unit}"  # fits into 80 columns; tqdm puts a comma before its postfix


class Progress:
    """Counts finished steps of a stage and says how it goes; used in a with block.

    Every step goes to ``train.log``; a terminal shows a bar, other outputs a line now and then.

    Args:
        what: The stage.
        total: Steps in all.
        done: Steps that an earlier run has done.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self.terminal = sys.stderr.isatty() and speaks()
        self.last_line = self.last_frame = time.monotonic()

    def __enter__(self) -> Progress:
        self.bar = tqdm(
            total=self.total,
            initial=self.done,
            desc=self._count(),
            bar_format=FORMAT,
            unit="",
            disable=not self.terminal,
            leave=False,
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def _count(self) -> str:
        return f"{self.what} {self.done:>{len(str(self.total))}}/{self.total}"

    def within(self, share: float) -> None:
        """An epoch is under way.

        Args:
            share: What is done of it, from 0 to 1.
        """
        now = time.monotonic()
        if self.terminal and now - self.last_frame >= SECONDS_BETWEEN_FRAMES:
            self.last_frame = now
            self.bar.n = self.done + share
            self.bar.refresh()
        elif not self.terminal and now - self.last_line >= SECONDS_OF_SILENCE:
            self.last_line = now
            log.info(
                "  %s: %.0f %% of epoch %d of %d", self.what, 100 * share, self.done + 1, self.total
            )

    def advance(self, text: str, more: str = "") -> None:
        """One more step is done.

        Args:
            text: How it went, in few words.
            more: What only the log has room for.
        """
        self.done += 1
        self.bar.set_description_str(self._count(), refresh=False)
        self.bar.unit = text
        self.bar.n = self.done
        self.bar.refresh()
        due = time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES
        level = logging.INFO if due and not self.terminal else logging.DEBUG
        if level == logging.INFO:
            self.last_line = time.monotonic()
        log.log(level, "  %s %d/%d: %s", self.what, self.done, self.total, text + more)
