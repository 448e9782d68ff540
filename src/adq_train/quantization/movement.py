"""How far training has moved thresholds and levels: what learned quantizers do, made visible."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from adq_train.quantization.prepare import quantized_layers

log = logging.getLogger(__name__)

# Less than this share of themselves after a whole training: learned, but not moved.
STILL = 2e-3
# More than this multiple of themselves: they ran away.
ASTRAY = 10.0


@dataclass(frozen=True)
class Movement:
    """How far one layer's quantizers have moved, as shares of where they began (L2 norms).

    Attributes:
        weight_levels: Of the weights' levels.
        input_levels: Of the input's levels.
        thresholds: Of the thresholds between them.
        width_ratio: The widest of the intervals between the thresholds over the narrowest; 1 for
            evenly spaced ones.
        update: The largest change of the first three since the record before, which is an epoch.
        learned: Whether the input's quantizer has parameters that an optimizer moves.
    """

    weight_levels: float
    input_levels: float
    thresholds: float
    width_ratio: float
    update: float
    learned: bool

    @property
    def input(self) -> float:
        """How far the input's quantizer has moved."""
        return max(self.input_levels, self.thresholds)


@torch.no_grad()
def places(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Copies of the levels and thresholds of a prepared network, by layer."""
    return {
        name: {
            "weight_levels": layer.weight_quantizer.levels().clone(),
            "input_levels": layer.input_quantizer.levels().clone(),
            "thresholds": layer.input_quantizer.thresholds().clone(),
        }
        for name, layer in quantized_layers(model).items()
    }


class MovementMeter:
    """Compares a network's quantizers with where they stood at the start.

    Args:
        model: Prepared and calibrated.
    """

    def __init__(self, model: nn.Module) -> None:
        self.start = places(model)

    def measure(
        self, model: nn.Module, before: Mapping[str, Mapping[str, float]] | None = None
    ) -> dict[str, Movement]:
        """The movement of every layer since the start.

        Args:
            model: The same network, trained further.
            before: The last record, by layer; a figure that it lacks counts as 0.
        """
        now, layers = places(model), quantized_layers(model)
        found = {}
        for name, tensors in now.items():
            moved = {x: _moved(self.start[name][x], tensor) for x, tensor in tensors.items()}
            last = (before or {}).get(name, {})
            update = max(abs(value - last.get(x, 0.0)) for x, value in moved.items())
            widths = tensors["thresholds"].diff()
            ratio = float(widths.max() / widths.min()) if len(widths) and widths.min() > 0 else 1.0
            learned = any(p.requires_grad for p in layers[name].input_quantizer.parameters())
            found[name] = Movement(**moved, width_ratio=ratio, update=update, learned=learned)
        return found


def _moved(before: Tensor, now: Tensor) -> float:
    return float((now - before).norm() / before.norm().clamp_min(torch.finfo(before.dtype).tiny))


def report_movement(movements: Mapping[str, Movement]) -> None:
    """Says what a finished training made of its quantizers; a warning where that looks wrong.

    Args:
        movements: Since calibration, of the layers whose input quantizers have learned parameters.
    """
    inputs = {name: x.input for name, x in movements.items() if x.learned}
    if not inputs:
        return
    most = max(inputs, key=inputs.__getitem__)
    line = (
        f"qat: learned thresholds and levels of inputs moved by {median(inputs.values()):.1%} "
        f"(median of {len(inputs)} layers; {inputs[most]:.1%} in {most}); widest interval "
        f"{median(x.width_ratio for x in movements.values() if x.learned):.2f} times the narrowest"
    )
    if inputs[most] < STILL:
        log.warning("%s: they hardly learn; raise quantizer_optimizer.lr", line)
    elif inputs[most] > ASTRAY:
        log.warning("%s: they run away; lower quantizer_optimizer.lr", line)
    else:
        log.info("%s", line)
