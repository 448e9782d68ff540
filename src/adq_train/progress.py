"""Progress: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

from adq_train.messages import speaks

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


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
        self.last_line = time.monotonic()

    def __enter__(self) -> Progress:
        self.bar = tqdm(
            total=self.total,
            initial=self.done,
            desc=f"  {self.what}",
            disable=not self.terminal,
            leave=False,
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def advance(self, text: str) -> None:
        """One more step is done; ``text`` says how it went."""
        self.done += 1
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        due = time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES
        level = logging.INFO if due and not self.terminal else logging.DEBUG
        if level == logging.INFO:
            self.last_line = time.monotonic()
        log.log(level, "  %s %d/%d: %s", self.what, self.done, self.total, text)
