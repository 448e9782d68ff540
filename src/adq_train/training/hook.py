"""What a training does besides its step: hooks, each in a file of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from adq_train.training.trainer import Trainer


@dataclass(frozen=True)
class EpochReport:
    """What one epoch gave; ``epoch`` counts from 1, ``lr`` is the last step's base rate.

    The last three figures are of its training, without evaluation.
    """

    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    validation_top1_percent: float
    lr: float
    seconds: float
    images_per_second: float
    data_wait_percent: float
    peak_memory_bytes: int


class Hook:
    """Something that a :class:`~.trainer.Trainer` does; every method here does nothing.

    A trainer calls each method of all its hooks, in their order, before it goes on.
    """

    def restore(self, trainer: Trainer) -> None:
        """Before all else; may give the trainer an earlier state."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def context(self, trainer: Trainer) -> AbstractContextManager[object]:
        """A context that all epochs run in."""
        return contextlib.nullcontext()

    def on_batch(self, trainer: Trainer, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch to train on, from images (N, C, H, W) and targets (N,) or (N, K)."""
        return images, targets

    def loss(self, logits: Tensor, images: Tensor, loss: Callable[[], Tensor]) -> Tensor:
        """The loss () of logits (N, K), from the one that the hooks before this one give."""
        return loss()

    def on_gradients(self, trainer: Trainer, batch: tuple[Tensor, Tensor], loss: Tensor) -> bool:
        """Whether to take the step that the gradients ask for; ``loss`` is () and detached."""
        return True

    def after_update(self, trainer: Trainer, step: int) -> None:
        """After an optimizer step that was taken, of number ``step``, from 1."""

    def after_batch(self, trainer: Trainer) -> None:
        """After every batch, whether its step was taken or left out."""

    def flush(self, trainer: Trainer) -> None:
        """After an epoch's last batch, and before a checkpoint: nothing may be under way."""

    def before_evaluation(self, trainer: Trainer) -> None:
        """After an epoch's training."""

    def evaluated(self) -> nn.Module | None:
        """The network to evaluate and to keep instead of the one that is trained."""
        return None

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> None:
        """After an epoch's evaluation."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: tensors and plain types, under names that no other hook has."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave, among what other hooks gave."""
