"""Layers at several bit-widths at once, in shares that are learned (EdMIPS, arXiv 2004.05795)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from adq_train.artifacts import LayerBits
from adq_train.quantization.base import (
    ActivationQuantizer,
    MakeActivationQuantizer,
    MakeWeightQuantizer,
    Quantizer,
    WeightQuantizer,
)
from adq_train.quantization.layers import QuantLayer, quantized
from adq_train.quantization.prepare import quantize_layer


@dataclass(frozen=True)
class Choice:
    """A bit-width that is still open.

    Attributes:
        widths: The candidates.
        logits: (len(widths),), a leaf that gradients reach; all 0 where nothing is preferred.
    """

    widths: tuple[int, ...]
    logits: Tensor

    @classmethod
    def among(cls, widths: Sequence[int], device: torch.device) -> Choice:
        """A choice without a preference."""
        return cls(tuple(widths), torch.zeros(len(widths), device=device, requires_grad=True))

    def shares(self) -> Tensor:
        """softmax(logits): positive, of sum 1."""
        return self.logits.softmax(0)

    def surprise(self) -> dict[int, float]:
        """-log of each candidate's share, at least 0."""
        logs = self.logits.detach().double().log_softmax(0).tolist()
        return {width: 0.0 - x for width, x in zip(self.widths, logs, strict=True)}


@dataclass(frozen=True)
class LayerChoice:
    """The open bits of a layer: of its weights and of its input; one choice for both if tied."""

    weights: Choice
    inputs: Choice

    @property
    def tied(self) -> bool:
        """Whether the two are one."""
        return self.weights is self.inputs

    def option_shares(self) -> Tensor:
        """The share of each option, in the order of :meth:`~.budget.Problem.options`, of sum 1.

        Returns:
            (widths,) if tied, else (widths · widths,): two choices are independent.
        """
        weights = self.weights.shares()
        return weights if self.tied else torch.outer(weights, self.inputs.shares()).flatten()


class Mixture(nn.Module):
    """Σ_b share_b · Q_b(x), in a layer's place for a quantizer of its weight or of its input.

    The quantizers stay as they are: each follows the weight and has its own learned parameters.
    The logits are none of the network's parameters, so that its optimizer leaves them alone.

    Args:
        quantizers: One for each candidate of the choice, calibrated; all of weights, or of inputs.
        choice: How much of each.
    """

    def __init__(self, quantizers: Iterable[Quantizer], choice: Choice) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.choice = choice

    def forward(self, x: Tensor) -> Tensor:
        """The mixture of a tensor's quantized forms, of its shape."""
        shares = self.choice.shares()
        parts = (share * q(x) for share, q in zip(shares, self.quantizers, strict=True))
        total: Tensor = reduce(torch.add, parts)
        return total

    @torch.no_grad()
    def adapt(self, weight: Tensor) -> None:
        """Lets each codebook follow the weight; see :class:`~.base.WeightQuantizer`."""
        for quantizer in cast("Iterable[WeightQuantizer]", self.quantizers):
            quantizer.adapt(weight)

    adapt_all = WeightQuantizer.adapt_all  # one by one

    @torch.no_grad()
    def regularize(self) -> None:
        """Lets each quantizer of inputs add to the gradients of its own parameters."""
        for quantizer in cast("Iterable[ActivationQuantizer]", self.quantizers):
            quantizer.regularize()


def mix_layer(
    model: nn.Module,
    name: str,
    choice: LayerChoice,
    make_weight_quantizer: MakeWeightQuantizer,
    make_activation_quantizer: MakeActivationQuantizer,
    inputs: Mapping[str, Tensor],
    seed: int,
) -> dict[str, QuantLayer]:
    """The mixed form of a layer, and of those that share its weight; see :func:`quantize_layer`.

    Args:
        model: The float network; the result shares its parameters.
        name: The layer.
        choice: Its open bits.
        make_weight_quantizer: Maps a bit-width to a quantizer.
        make_activation_quantizer: Maps a bit-width to a quantizer.
        inputs: A sample of each layer's inputs, any shape.
        seed: For random initialisations.

    Returns:
        Layers by name; their mixtures share the choice, and those of a shared weight are one.

    Raises:
        UserError: Weights or inputs are NaN or infinite; the layer is named.
    """
    make = make_weight_quantizer, make_activation_quantizer
    forms = [
        quantize_layer(model, LayerBits(name, bits, bits), *make, inputs, seed)
        for bits in choice.weights.widths
    ]
    weights = Mixture((form[name].weight_quantizer for form in forms), choice.weights)
    return {
        other: quantized(
            model.get_submodule(other),
            weights,  # type: ignore[arg-type]
            Mixture((form[other].input_quantizer for form in forms), choice.inputs),  # type: ignore[arg-type]
        )
        for other in forms[0]
    }
