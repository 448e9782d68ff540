"""An average of the weights over the last steps, for evaluation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from adq_train.quantization.base import WeightQuantizer
from adq_train.quantization.prepare import Upkeep
from adq_train.states import load_state
from adq_train.training.batch_norm import batch_norms
from adq_train.training.hook import Hook
from adq_train.training.trainer import Trainer


def decay_at(step: int, decay: float) -> float:
    """min(γ, (1 + t) / (10 + t)): while few steps are done, the average forgets the start faster.

    Args:
        step: t, finished optimizer steps, from 1.
        decay: γ, in [0, 1).
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage(Hook):
    """An exponential moving average of a network's parameters, as a network of its own.

    Its running statistics of batch norm are averages at the same rate. Its codebooks are not:
    an average of sorted levels would fit neither network, so they follow the averaged weights by
    the quantizer's own rule. Other buffers are copies.

    Args:
        model: Float or prepared; copied.
        decay: γ, in [0, 1); see :func:`decay_at`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.trained = model
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._upkeep = Upkeep(self.model)

    def evaluated(self) -> nn.Module:
        """The averaged network."""
        return self.model

    @torch.no_grad()
    def after_update(self, trainer: Trainer, step: int) -> None:
        """Takes in the weights after optimizer step number ``step``, from 1."""
        model = self.trained
        statistics = [f"{name}.running_{x}" for name in batch_norms(model) for x in ("mean", "var")]
        own = [x.lstrip(".") for x in statistics]  # the network may be a batch norm itself
        codebooks = {
            f"{name}.{buffer}"
            for name, module in model.named_modules()
            if isinstance(module, WeightQuantizer)
            for buffer, _ in module.named_buffers()
        }
        mine, theirs = dict(self.model.named_buffers()), dict(model.named_buffers())
        averages = *self.model.parameters(), *(mine[x] for x in own)
        values = *model.parameters(), *(theirs[x] for x in own)
        # a ← γ a + (1 - γ) v
        get_ema_multi_avg_fn(decay_at(step, self.decay))(averages, values, 0)  # type: ignore[no-untyped-call]
        for name in theirs.keys() - codebooks - set(own):
            mine[name].copy_(theirs[name])
        self._upkeep.after_step()

    def on_end(self, trainer: Trainer) -> None:
        """Gives the trained network the averaged weights."""
        load_state(self.trained, self.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The weights that are trained; a checkpoint's model has the averaged ones."""
        return {"trained": self.trained.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        load_state(self.trained, state["trained"])
