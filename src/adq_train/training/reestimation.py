"""Batch norm's statistics, estimated anew before each evaluation of a training."""

from __future__ import annotations

from adq_train.data.base import Amount, num_images, number_of
from adq_train.training.batch_norm import first_images, reestimate_batch_norm
from adq_train.training.hook import Hook
from adq_train.training.trainer import Trainer


class ReestimateBatchNorm(Hook):
    """Batch norm's statistics of the evaluated network, from training images of the epoch.

    Args:
        amount: So many of them, at least, or such a share; 0 keeps the statistics of training.
        together: So many make one batch. Averages over small batches mislead a network whose
            values cross thresholds.
    """

    def __init__(self, amount: Amount, together: int = 1) -> None:
        self.amount, self.together = amount, together

    def before_evaluation(self, trainer: Trainer) -> None:
        """Estimates them."""
        train = trainer.data.train
        count = number_of(self.amount, num_images(train))
        if not count:
            return
        images = first_images(train, trainer.epoch, count, self.together)
        reestimate_batch_norm(trainer.evaluated, images)
        trainer.ranks.broadcast_model(trainer.evaluated)
