"""Oscillation damping: weights are drawn to the levels that they are nearest to."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adq_train.quantization.base import WeightQuantizer
from adq_train.quantization.layer_weights import used_weight
from adq_train.quantization.layers import QuantLayer
from adq_train.quantization.prepare import weight_quantizers
from adq_train.training.hook import Hook
from adq_train.training.trainer import Trainer

log = logging.getLogger(__name__)


def damping_loss(layers: Mapping[WeightQuantizer, QuantLayer]) -> Tensor:
    """Σ (ŵ − clip(w))² over all quantized weights w, (), with gradients to w alone.

    Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.08086): ŵ is
    what quantization makes of w, and weights beyond the outermost levels count as those levels.

    Args:
        layers: A layer of each weight quantizer, as :func:`~.prepare.weight_quantizers` gives them.
    """
    losses = []
    for quantizer, layer in layers.items():
        weight = used_weight(layer)
        with torch.no_grad():
            levels, scale = quantizer.levels(), quantizer.output_scale(weight)
            nearest = quantizer(weight)
        clipped = weight.clamp(levels[0] * scale, levels[-1] * scale)
        losses.append((nearest - clipped).square().sum())
    return torch.stack(losses).sum()


class Damping(Hook):
    """Adds the gradients of :func:`damping_loss`, with a weight that rises from 0.

    Args:
        model: Prepared and calibrated.
        weight: λ of the last step; of the share t of all steps it is λ (1 − cos πt) / 2.
    """

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.layers, self.weight = weight_quantizers(model), weight
        self.before = self._distance()

    @torch.no_grad()
    def _distance(self) -> float:
        """The loss as a share of Σ w²."""
        squares = sum(float(used_weight(x).square().sum()) for x in self.layers.values())
        return float(damping_loss(self.layers)) / (squares or 1.0)

    def on_gradients(self, trainer: Trainer, batch: tuple[Tensor, Tensor], loss: Tensor) -> bool:
        """Adds them; they are the same in every process."""
        done = trainer.steps / (trainer.settings.epochs * len(trainer.data.train))
        weight = self.weight * (1 - math.cos(math.pi * done)) / 2
        (weight * damping_loss(self.layers)).backward()  # type: ignore[no-untyped-call]
        return True

    def on_end(self, trainer: Trainer) -> None:
        """Says how near to their levels the weights have come."""
        log.info(
            "oscillation damping: the squared distances of weights to their levels are %.2g of "
            "their squares, after %.2g at the start", self._distance(), self.before,
        )  # fmt: skip
