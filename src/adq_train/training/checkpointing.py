"""When a training writes checkpoints, and how it goes on from one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adq_train.interrupts import Interrupted, deferred
from adq_train.states import load_state
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.hook import EpochReport, Hook
from adq_train.training.trainer import Trainer

log = logging.getLogger(__name__)


class Checkpoints(Hook):
    """A checkpoint after every epoch and within it, and where a signal asks to stop.

    Args:
        folder: Where they are.
        key: Everything that the outcome depends on; other checkpoints are not used.
        stage: Shown in its messages.
        steps: Within an epoch, after every so many steps of it; None: not by steps.
        minutes: When so much time has passed since the last one; None: not by time.
        resumed: Called with the seconds that the epochs of an earlier process took.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        key: str,
        stage: str = "training",
        *,
        steps: int | None = None,
        minutes: float | None = None,
        resumed: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.folder, self.key, self.stage = folder, key, stage
        self.steps, self.minutes, self.resumed = steps, minutes, resumed
        self.best = -math.inf
        self.saved = time.monotonic()
        self._received: Callable[[], int] = lambda: 0

    def restore(self, trainer: Trainer) -> None:
        """Gives the trainer the state of the newest intact checkpoint, where there is one."""
        state = trainer.ranks.broadcast(lambda: self.folder.load(self.key))
        if state is None:
            return
        load_state(trainer.evaluated, state["model"])
        trainer.load_state_dict(state)
        self.best = state["best_top1_percent"]
        self.resumed(trainer.seconds)
        batches = trainer.sums.batches
        within = f", {batches} steps of the next" if batches else ""
        epochs = trainer.settings.epochs
        log.info("%s: continuing after epoch %d of %d%s", self.stage, trainer.epoch, epochs, within)

    @contextmanager
    def context(self, trainer: Trainer) -> Iterator[None]:
        """Keeps signals back until the step under way is done."""
        with deferred() as self._received:
            yield

    def after_batch(self, trainer: Trainer) -> None:
        """Saves where that is due.

        Raises:
            Interrupted: A signal asked to stop; a checkpoint was saved.
        """
        batches = trainer.sums.batches
        stop, due = trainer.ranks.all_reduce_max(self._received(), self._is_due(batches))
        if stop or (due and batches < len(trainer.data.train)):
            for hook in trainer.hooks:
                hook.flush(trainer)
            self._save(trainer, trainer.seconds + time.perf_counter() - trainer.began)
        if stop:
            raise Interrupted(stop)

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> None:
        """Saves, and keeps the best model besides.

        Raises:
            Interrupted: A signal asked to stop.
        """
        is_best = report.validation_top1_percent > self.best
        self.best = max(self.best, report.validation_top1_percent)
        self._save(trainer, trainer.seconds, is_best)
        (stop,) = trainer.ranks.all_reduce_max(self._received())
        if stop:
            raise Interrupted(stop)

    def _is_due(self, batches: int) -> bool:
        by_steps = self.steps is not None and batches % self.steps == 0
        waited = time.monotonic() - self.saved
        return by_steps or (self.minutes is not None and waited >= 60 * self.minutes)

    def _save(self, trainer: Trainer, seconds: float, is_best: bool = False) -> None:
        if trainer.ranks.is_main:
            content = {
                **trainer.state_dict(),
                "key": self.key,
                "best_top1_percent": self.best,
                "seconds": seconds,
                "model": trainer.evaluated.state_dict(),
            }
            self.folder.save(content, best=is_best)
        self.saved = time.monotonic()
