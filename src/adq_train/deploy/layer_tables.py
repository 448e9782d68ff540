"""Quantizers as plain tables: weights as codes and a codebook, inputs as a staircase.

Both are read off the quantizer's own ``forward`` and checked against it, so that any method can
be exported without this package knowing it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adq_train.errors import UserError
from adq_train.quantization.base import ActivationQuantizer, WeightQuantizer
from adq_train.quantization.layer_weights import used_weight
from adq_train.quantization.layers import QuantEmbedding, QuantLayer


@dataclass(frozen=True)
class WeightTable:
    """A quantized weight: ``codebook[codes] * scale``.

    Attributes:
        bit_width: Bits of a code.
        codes: (C_out, …) uint8.
        codebook: (K,) float32, K ≤ 2^bit_width.
        scale: (C_out,) float32, or None where every channel's is 1.
    """

    bit_width: int
    codes: Tensor
    codebook: Tensor
    scale: Tensor | None

    def weight(self) -> Tensor:
        """The weights (C_out, …), float32."""
        weight = self.codebook[self.codes.long()]
        if self.scale is None:
            return weight
        return weight * self.scale.view(-1, *[1] * (weight.dim() - 1))


@dataclass(frozen=True)
class Staircase:
    """A quantized input: ``levels[number of thresholds below x]``.

    Attributes:
        bit_width: Bits of a code.
        thresholds: (K - 1,) float32, ascending; a step belongs to the values above its threshold.
        levels: (K,) float32; one where the input is indices.
    """

    bit_width: int
    thresholds: Tensor
    levels: Tensor


@dataclass(frozen=True)
class Edge:
    """What quantizes a value between layers: codes ``low`` … ``high`` times a step.

    Attributes:
        step: A float32 number.
        low: Smallest code.
        high: Largest code.
    """

    step: float
    low: int
    high: int


@dataclass(frozen=True)
class LayerTables:
    """The tables of one quantized layer."""

    weight: WeightTable
    input: Staircase


@torch.no_grad()
def tables_of(name: str, layer: QuantLayer) -> LayerTables:
    """The tables that stand for a trained layer's two quantizers.

    Args:
        name: The layer's name, for messages.
        layer: On the CPU.

    Raises:
        UserError: A quantizer does something that tables cannot express.
    """
    try:
        weight = weight_table(layer.weight_quantizer, used_weight(layer))
        if isinstance(layer, QuantEmbedding):
            bits = layer.input_quantizer.bit_width
            return LayerTables(weight, Staircase(bits, torch.zeros(0), torch.zeros(1)))
        return LayerTables(weight, staircase(layer.input_quantizer))
    except ValueError as error:
        raise UserError(f"layer {name} cannot be exported: {error}") from error


@torch.no_grad()
def weight_table(quantizer: WeightQuantizer, weight: Tensor) -> WeightTable:
    """Codes, codebook and scale whose product is exactly what the quantizer makes of a weight.

    Args:
        quantizer: Calibrated or trained.
        weight: (C_out, …) float32.

    Raises:
        ValueError: The quantized weight is not a codebook entry times a scale per channel.
    """
    target, codes = quantizer(weight).detach().float(), quantizer.quantize(weight)
    codebook = quantizer.levels().detach().float().clone()
    if int(codes.max()) >= len(codebook) or len(codebook) > 2**quantizer.bit_width:
        raise ValueError(f"its {quantizer.bit_width}-bit weights have codes without a level")
    scales = _channel_scales(target, codebook[codes.long()])
    # One scale of a whole layer goes into its codebook.
    for values, scale in ((codebook, None), (codebook * scales[0], None), (codebook, scales)):
        table = WeightTable(quantizer.bit_width, codes.clone(), values, scale)
        if torch.equal(table.weight(), target):
            return table
    raise ValueError(
        f"the weights of {type(quantizer).__name__} are not levels()[quantize(w)] times a scale "
        "per channel, bit for bit"
    )


def _channel_scales(target: Tensor, base: Tensor) -> Tensor:
    """The factor of each channel with ``base * factor == target``, if there is one.

    The quotient of two float32 values is within two units in the last place of the factor; of
    these five candidates the one that gives most values of the channel back is taken.

    Args:
        target: (C_out, …).
        base: The same shape.

    Returns:
        (C_out,); 1 for a channel of zeros.
    """
    target, base = target.flatten(1), base.flatten(1)
    largest = base.abs().argmax(1, keepdim=True)
    divisor = base.gather(1, largest).squeeze(1)
    quotient = target.gather(1, largest).squeeze(1) / divisor
    quotient = torch.where(divisor == 0, 1.0, quotient)
    infinity = torch.full_like(quotient, torch.inf)
    up, down = torch.nextafter(quotient, infinity), torch.nextafter(quotient, -infinity)
    candidates = torch.stack(
        [quotient, up, down, torch.nextafter(up, infinity), torch.nextafter(down, -infinity)]
    )
    hits = torch.stack([(base * c[:, None] == target).sum(1) for c in candidates])
    return candidates.gather(0, hits.argmax(0, keepdim=True)).squeeze(0)


@torch.no_grad()
def staircase(quantizer: ActivationQuantizer) -> Staircase:
    """The thresholds and levels of a quantizer whose output never falls with its input.

    Each threshold is the largest float32 below the step, found by bisection over the ordered bit
    patterns of all float32 numbers; so it is exact whatever the quantizer computes.

    Args:
        quantizer: Calibrated or trained.

    Raises:
        ValueError: The output falls somewhere, or is not one of the quantizer's levels.
    """
    levels = quantizer.levels().detach().float().sort().values
    levels = levels[torch.cat([torch.tensor([True]), levels.diff() > 0])]
    reach = torch.finfo(torch.float32).max
    low, high = (torch.full((len(levels) - 1,), _order(x)) for x in (-reach, reach))
    low, high = low - 1, high + 1  # the infinities
    for _ in range(33):
        middle = (low + high).div(2, rounding_mode="floor")
        below = quantizer(_float(middle)) < levels[1:]
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    thresholds = _float(low)
    stairs = Staircase(quantizer.bit_width, thresholds, levels)
    # On, just above and between the thresholds, and far outside.
    spread = float(thresholds[thresholds.isfinite()].abs().max().clamp_min(1e-30))
    probes = torch.cat(
        [
            thresholds,
            _float(low + 1),
            torch.linspace(-2 * spread, 2 * spread, 4097),
            torch.tensor([0.0, -reach, reach]),
        ]
    )
    probes = probes[probes.isfinite()]
    expected = levels[torch.bucketize(probes, thresholds)]
    if not torch.equal(quantizer(probes), expected):
        raise ValueError(f"the output of {type(quantizer).__name__} does not rise level by level")
    return stairs


def _order(x: float) -> int:
    """The place of a float32 number among all of them."""
    pattern = int(torch.tensor(x, dtype=torch.float32).view(torch.int32))
    return pattern if pattern >= 0 else -(pattern & 0x7FFFFFFF)


def _float(order: Tensor) -> Tensor:
    """The float32 numbers at these places, the inverse of :func:`_order`; -0 is 0."""
    magnitude = order.abs().to(torch.int32).view(torch.float32)
    return torch.where(order < 0, -magnitude, magnitude)


def uniform_grid(levels: Tensor) -> tuple[Tensor, int] | None:
    """Step () and zero point with ``levels == (code - zero point) * step`` bit for bit, or None.

    Args:
        levels: (K,) float32, ascending.
    """
    zeros = (levels == 0).nonzero().flatten()
    if len(zeros) != 1 or len(levels) < 2:
        return None
    zero_point = int(zeros[0])
    neighbour = zero_point + (1 if zero_point + 1 < len(levels) else -1)
    step = levels[neighbour].abs()
    grid = (torch.arange(len(levels)) - zero_point) * step
    return (step, zero_point) if torch.equal(grid, levels) else None
