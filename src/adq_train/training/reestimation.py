"""Batch norm's statistics, estimated anew before each evaluation of a training."""

from __future__ import annotations

from adq_train.training.batch_norm import first_images, reestimate_batch_norm
from adq_train.training.hook import Hook
from adq_train.training.trainer import Trainer


class ReestimateBatchNorm(Hook):
    """Batch norm's statistics of the evaluated network, from training images of the epoch.

    Args:
        num_images: So many of them, at least; 0 keeps the statistics of training.
        together: So many make one batch. Averages over small batches mislead a network whose
            values cross thresholds.
    """

    def __init__(self, num_images: int, together: int = 1) -> None:
        self.num_images, self.together = num_images, together

    def before_evaluation(self, trainer: Trainer) -> None:
        """Estimates them."""
        if not self.num_images:
            return
        images = first_images(trainer.data.train, trainer.epoch, self.num_images, self.together)
        reestimate_batch_norm(trainer.evaluated, images)
        trainer.ranks.broadcast_model(trainer.evaluated)
