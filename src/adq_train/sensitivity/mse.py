"""Relative squared error of the weights: what needs neither images nor gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from adq_train.artifacts import LayerInfo, LayerSensitivity
from adq_train.sensitivity.base import Conditions, Metric, layer_weight, weight_error


@dataclass(frozen=True)
class Mse(Metric):
    """Ω[l, b] = ‖ΔW‖² / ‖W‖², with ΔW the error of the weight quantizer in use.

    Between 0 and about 1, whatever the scale of the weights. Weights that are all zero and stay
    so cost 0.
    """

    name = "mse"

    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Measures one layer after the other; see :class:`~.base.SensitivityMetric`."""
        for info in layers:
            power = layer_weight(model, info.name).detach().double().square().sum()
            values = {}
            for bits in conditions.bit_widths:
                error = weight_error(model, info.name, bits, conditions)
                squared = error.double().square().sum()
                values[bits] = float(squared / power) if squared else 0.0
            yield LayerSensitivity(info.name, info.num_weights, info.macs, values)
