"""What a training tells while it goes: a line or a bar's text after every epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from adq_train.data.base import FirstBatches
from adq_train.progress import Progress
from adq_train.training.hook import EpochReport, Hook
from adq_train.training.throughput import duration
from adq_train.training.trainer import Trainer

log = logging.getLogger(__name__)


class ProgressBar(Hook):
    """Shows how each epoch went, and the time that is left.

    Args:
        stage: Its name.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_start(self, trainer: Trainer) -> None:
        """Says where the last step of an epoch is larger than the others."""
        train = trainer.data.train
        if isinstance(train, FirstBatches):  # a dry run's, whose sizes are in another order
            return
        last, whole = train.size(len(train) - 1), train.size(0)
        if last > whole and trainer.epoch < trainer.settings.epochs:
            log.info(
                "%s: the last step of an epoch takes %d images: %d left over would be too few for "
                "a step of their own",
                self.stage,
                last,
                last - whole,
            )

    @contextmanager
    def context(self, trainer: Trainer) -> Iterator[None]:
        """Shows the bar."""
        epochs = trainer.settings.epochs
        self.before = trainer.steps, trainer.seconds
        with Progress(self.stage, total=epochs, done=trainer.epoch) as self.progress:
            yield

    def after_batch(self, trainer: Trainer) -> None:
        """Moves the bar within an epoch."""
        self.progress.within(trainer.sums.batches / len(trainer.data.train))

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> None:
        """Tells how it went."""
        # By the steps of this process: before it, the machine may have been another or busier.
        steps, seconds = self.before
        each = (trainer.seconds - seconds) / (trainer.steps - steps)
        left = each * (trainer.settings.epochs * len(trainer.data.train) - trainer.steps)
        self.progress.advance(
            f"loss {report.train_loss:.3f}, validation {report.validation_top1_percent:.1f} %, "
            f"{duration(left)} left",
            f", {report.images_per_second:.0f} images/s, {report.data_wait_percent:.0f} % of the "
            f"time waiting for data, memory at most {report.peak_memory_bytes / 1e6:.0f} MB",
        )
