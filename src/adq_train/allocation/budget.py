"""What an allocation costs, and what it may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import NamedTuple

from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError
from adq_train.shares import share

FLOAT_BITS = 32


class Bits(NamedTuple):
    """Bits of one layer's weights and of its input."""

    weights: int
    activations: int


@dataclass(frozen=True)
class Budget:
    """Upper limits; None for no limit.

    Attributes:
        average_weight_bits: Mean bits per weight over the layers whose bits are chosen.
        average_activation_bits: Mean bits per input element over the same layers.
        model_size_bytes: Packed weights of all quantized layers.
        bops: Bit operations of one image, over all quantized layers.
    """

    average_weight_bits: float | None = None
    average_activation_bits: float | None = None
    model_size_bytes: float | None = None
    bops: float | None = None

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value) for name, value in values.items() if value is not None}


def budget_from(amounts: Mapping[str, float | str | None], layers: Sequence[LayerInfo]) -> Budget:
    """A budget in absolute figures.

    The float model has 32 bits per weight and input element: 4 bytes per weight, and
    MACs × 32 × 32 bit operations.

    Args:
        amounts: By budget name: a number, a share of the float model's (``0.1x``), or None.
        layers: All quantizable layers.

    Raises:
        ValueError: A text that is no such share.
    """
    of_float = {
        "average_weight_bits": FLOAT_BITS,
        "average_activation_bits": FLOAT_BITS,
        "model_size_bytes": sum(packed_bytes(x.num_weights, FLOAT_BITS) for x in layers),
        "bops": sum(x.macs for x in layers) * FLOAT_BITS**2,
    }
    return Budget(
        **{
            name: float(share(amount, "of the float model's") * of_float[name])
            if isinstance(amount, str)
            else amount
            for name, amount in amounts.items()
        }
    )


def packed_bytes(num_weights: int, bits: int) -> int:
    """Bytes of a layer's packed codes; each layer starts at a byte."""
    return -(-num_weights * bits // 8)


@dataclass(frozen=True)
class Limit:
    """One budget as an inequality: Σ_l cost(l, bits_l) ≤ bound, in whole units.

    Attributes:
        name: Name of the budget.
        cost: What a layer costs at some bits, an integer that never falls when bits rise.
        bound: Largest allowed sum.
        unit: The user's figure is the sum divided by this.
    """

    name: str
    cost: Callable[[LayerInfo, Bits], int]
    bound: int
    unit: int

    def total(self, layers: Sequence[LayerInfo], bits: Mapping[str, Bits]) -> int:
        """Σ_l cost(l, bits_l)."""
        return sum(self.cost(x, bits[x.name]) for x in layers)


@dataclass(frozen=True)
class Problem:
    """Everything that an allocator chooses from.

    Attributes:
        layers: All quantizable layers, in the order of execution.
        pinned: Layers whose bits are given, and these bits, of the weights and of the input.
        candidates: Bit-widths that the other layers may get, ascending.
        budget: The limits.
        candidates_by_layer: Other candidates for some of the layers, by name.
        tied: Whether a layer's input gets as many bits as its weights.
    """

    layers: tuple[LayerInfo, ...]
    pinned: Mapping[str, int]
    candidates: tuple[int, ...]
    budget: Budget
    candidates_by_layer: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: bool = True

    @property
    def mixed(self) -> tuple[LayerInfo, ...]:
        """The layers whose bits are chosen."""
        return tuple(x for x in self.layers if x.name not in self.pinned)

    def widths(self, layer: LayerInfo) -> tuple[int, ...]:
        """The bit-widths that a layer's weights, and its input, may get, ascending."""
        if layer.name in self.pinned:
            return (self.pinned[layer.name],)
        return self.candidates_by_layer.get(layer.name, self.candidates)

    def options(self, layer: LayerInfo) -> tuple[Bits, ...]:
        """The bits that a layer may get; the first are the least, the last the most."""
        widths = self.widths(layer)
        if self.tied or layer.name in self.pinned:
            return tuple(Bits(b, b) for b in widths)
        return tuple(Bits(w, a) for w, a in product(widths, widths))

    def pinned_bits(self) -> dict[str, Bits]:
        """The bits of the pinned layers."""
        return {name: Bits(b, b) for name, b in self.pinned.items()}

    def limits(self) -> tuple[Limit, ...]:
        """The budget as inequalities over all layers."""
        num_weights = sum(x.num_weights for x in self.mixed)
        num_inputs = sum(x.num_inputs for x in self.mixed)

        def weight_bits(layer: LayerInfo, bits: Bits) -> int:
            return 0 if layer.name in self.pinned else layer.num_weights * bits.weights

        def input_bits(layer: LayerInfo, bits: Bits) -> int:
            return 0 if layer.name in self.pinned else layer.num_inputs * bits.activations

        costs: dict[str, tuple[Callable[[LayerInfo, Bits], int], int]] = {
            "average_weight_bits": (weight_bits, num_weights),
            "average_activation_bits": (input_bits, num_inputs),
            "model_size_bytes": (lambda x, b: packed_bytes(x.num_weights, b.weights), 1),
            "bops": (lambda x, b: x.macs * b.weights * b.activations, 1),
        }
        limits = []
        for name, bound in self.budget.limits().items():
            cost, unit = costs[name]
            # The hair keeps 2.81 × n from losing a whole unit to the binary form of 2.81.
            hair = 1 + 1e-12 if unit > 1 else 1
            limits.append(Limit(name, cost, math.floor(bound * unit * hair), unit))
        return tuple(limits)

    def broken(self, bits: Mapping[str, Bits]) -> list[str]:
        """One phrase for each limit that an allocation breaks, with what it needs."""
        asked = self.budget.limits()
        return [
            f"budget.{limit.name}: {total / limit.unit:.10g} of {asked[limit.name]:g}"
            for limit in self.limits()
            if (total := limit.total(self.layers, bits)) > limit.bound
        ]

    def check(self) -> None:
        """Refuses a budget that no allocation meets.

        Every cost rises with the bits, so the least bits of all layers decide for all limits, alone
        and together.

        Raises:
            UserError: Names the budget, and the least and the most that can be reached.
        """
        if not self.mixed:
            raise UserError(
                "bits: every layer of the model is pinned, so there is nothing to allocate; set "
                "bits.first_last=null, or pin fewer in bits.pinned"
            )
        least = {x.name: self.options(x)[0] for x in self.layers}
        most = {x.name: self.options(x)[-1] for x in self.layers}
        problems = []
        for limit in self.limits():
            lowest = limit.total(self.layers, least)
            if lowest > limit.bound:
                asked = self.budget.limits()[limit.name]
                highest = limit.total(self.layers, most)
                problems.append(
                    f"budget.{limit.name}: {asked:g} cannot be reached; with bits.candidates="
                    f"{list(self.candidates)} the least is {lowest / limit.unit:.10g} and the most "
                    f"{highest / limit.unit:.10g}; raise the budget or add smaller candidates"
                )
        if problems:
            raise UserError("\n".join(problems))


@dataclass(frozen=True)
class Figures:
    """What an allocation comes to; the names and units are those of :class:`BitAllocation`."""

    average_weight_bits: float
    average_weight_bits_all_layers: float
    average_activation_bits: float
    model_size_bytes: int
    bops: int


def figures(
    layers: Sequence[LayerInfo], bits: Mapping[str, Bits], pinned: Mapping[str, int]
) -> Figures:
    """Counts what some bits cost.

    Args:
        layers: All quantized layers.
        bits: Of every layer, by name.
        pinned: The layers that stay outside the averages, by name.
    """
    mixed = [x for x in layers if x.name not in pinned]

    def mean_weight_bits(some: Sequence[LayerInfo]) -> float:
        total = sum(x.num_weights * bits[x.name].weights for x in some)
        return total / sum(x.num_weights for x in some)

    input_bits = sum(x.num_inputs * bits[x.name].activations for x in mixed)
    return Figures(
        average_weight_bits=mean_weight_bits(mixed),
        average_weight_bits_all_layers=mean_weight_bits(layers),
        average_activation_bits=input_bits / sum(x.num_inputs for x in mixed),
        model_size_bytes=sum(packed_bytes(x.num_weights, bits[x.name].weights) for x in layers),
        bops=sum(x.macs * bits[x.name].weights * bits[x.name].activations for x in layers),
    )
