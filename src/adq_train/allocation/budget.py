"""What an allocation costs, and what it may cost."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from adq_train.artifacts import BitAllocation, LayerBits, LayerInfo, SensitivityTable
from adq_train.errors import UserError, did_you_mean


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


def packed_bytes(num_weights: int, bits: int) -> int:
    """Bytes of a layer's packed codes; each layer starts at a byte."""
    return -(-num_weights * bits // 8)


@dataclass(frozen=True)
class Limit:
    """One budget as an inequality: Σ_l cost(l, b_l) ≤ bound, in whole units.

    Attributes:
        name: Name of the budget.
        cost: What a layer costs at a bit-width, an integer.
        bound: Largest allowed sum.
        unit: The user's figure is the sum divided by this.
    """

    name: str
    cost: Callable[[LayerInfo, int], int]
    bound: int
    unit: int


@dataclass(frozen=True)
class Problem:
    """Everything that an allocator chooses from.

    Attributes:
        layers: All quantizable layers, in the order of execution.
        pinned: Layers whose bits are given, and these bits.
        candidates: Bit-widths that the other layers may get, ascending. A layer's input gets as
            many bits as its weights.
        budget: The limits.
    """

    layers: tuple[LayerInfo, ...]
    pinned: Mapping[str, int]
    candidates: tuple[int, ...]
    budget: Budget

    @property
    def mixed(self) -> tuple[LayerInfo, ...]:
        """The layers whose bits are chosen."""
        return tuple(x for x in self.layers if x.name not in self.pinned)

    def options(self, layer: LayerInfo) -> tuple[int, ...]:
        """The bit-widths that a layer may get."""
        return (self.pinned[layer.name],) if layer.name in self.pinned else self.candidates

    def limits(self) -> tuple[Limit, ...]:
        """The budget as inequalities over all layers."""
        num_weights = sum(x.num_weights for x in self.mixed)
        num_inputs = sum(x.num_inputs for x in self.mixed)

        def weight_bits(layer: LayerInfo, bits: int) -> int:
            return 0 if layer.name in self.pinned else layer.num_weights * bits

        def input_bits(layer: LayerInfo, bits: int) -> int:
            return 0 if layer.name in self.pinned else layer.num_inputs * bits

        costs: dict[str, tuple[Callable[[LayerInfo, int], int], int]] = {
            "average_weight_bits": (weight_bits, num_weights),
            "average_activation_bits": (input_bits, num_inputs),
            "model_size_bytes": (lambda x, b: packed_bytes(x.num_weights, b), 1),
            "bops": (lambda x, b: x.macs * b * b, 1),
        }
        limits = []
        for name, bound in self.budget.limits().items():
            cost, unit = costs[name]
            # The hair keeps 2.81 × n from losing a whole unit to the binary form of 2.81.
            hair = 1 + 1e-12 if unit > 1 else 1
            limits.append(Limit(name, cost, math.floor(bound * unit * hair), unit))
        return tuple(limits)

    def check(self) -> None:
        """Refuses a budget that no allocation meets.

        Every cost rises with the bits, so the least bits of all layers decide for all limits.

        Raises:
            UserError: Names the budget, and the least and the most that can be reached.
        """
        if not self.mixed:
            raise UserError(
                "bits: every layer of the model is pinned, so there is nothing to allocate; set "
                "bits.first_last=null or pin fewer in bits.pinned"
            )
        for limit in self.limits():
            least = sum(limit.cost(x, min(self.options(x))) for x in self.layers)
            most = sum(limit.cost(x, max(self.options(x))) for x in self.layers)
            if least > limit.bound:
                asked = self.budget.limits()[limit.name]
                raise UserError(
                    f"budget.{limit.name}: {asked:g} cannot be reached; with bits.candidates="
                    f"{list(self.candidates)} the least is {least / limit.unit:.10g} and the most "
                    f"{most / limit.unit:.10g}; raise the budget or add smaller candidates"
                )


def pinned_bits(
    layers: Sequence[LayerInfo], first_last: int | None, given: Mapping[str, int]
) -> dict[str, int]:
    """The layers whose bits are not to be chosen.

    Args:
        layers: All quantizable layers, in the order of execution.
        first_last: Bits of the first and the last layer, or None.
        given: Bits by layer name or shell pattern; they win over ``first_last``.

    Raises:
        UserError: A pattern matches no layer, or a layer is matched twice.
    """
    names = [x.name for x in layers]
    by_pattern: dict[str, str] = {}
    for pattern in given:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            near = did_you_mean(pattern, names) or f"; the layers are {', '.join(names)}"
            raise UserError(f"bits.pinned: no layer is called {pattern!r}{near}")
        for name in matched:
            if name in by_pattern:
                raise UserError(
                    f"bits.pinned: {by_pattern[name]!r} and {pattern!r} both match {name}; keep one"
                )
            by_pattern[name] = pattern
    ends = {names[0], names[-1]} if first_last else set()
    return {
        name: given[by_pattern[name]] if name in by_pattern else first_last or 0
        for name in names
        if name in by_pattern or name in ends
    }


class Allocator(Protocol):
    """Chooses bits for the layers that are not pinned."""

    @property
    def name(self) -> str:
        """The allocator's name in ``allocation.json``."""
        ...

    def choose(self, problem: Problem, table: SensitivityTable) -> tuple[dict[str, int], bool]:
        """Bits of every mixed layer by name, and whether they are proven optimal."""
        ...


def allocate(allocator: Allocator, problem: Problem, table: SensitivityTable) -> BitAllocation:
    """Lets an allocator choose, and accounts for what its choice costs.

    Args:
        allocator: Who chooses.
        problem: Layers, candidates and budget.
        table: Sensitivities of at least the mixed layers.

    Raises:
        UserError: No allocation meets the budget.
    """
    problem.check()
    chosen, optimal = allocator.choose(problem, table)
    bits = {**chosen, **problem.pinned}
    for limit in problem.limits():
        total = sum(limit.cost(x, bits[x.name]) for x in problem.layers)
        assert total <= limit.bound, f"{allocator.name} broke the limit {limit.name}"

    def mean(layers: tuple[LayerInfo, ...], count: Callable[[LayerInfo], int]) -> float:
        return sum(count(x) * bits[x.name] for x in layers) / sum(count(x) for x in layers)

    omega = {x.name: x.sensitivity for x in table.layers}
    return BitAllocation(
        allocator=allocator.name,
        budget=problem.budget.limits(),
        layers=tuple(LayerBits(x.name, bits[x.name], bits[x.name]) for x in problem.layers),
        average_weight_bits=mean(problem.mixed, lambda x: x.num_weights),
        average_weight_bits_all_layers=mean(problem.layers, lambda x: x.num_weights),
        average_activation_bits=mean(problem.mixed, lambda x: x.num_inputs),
        model_size_bytes=sum(packed_bytes(x.num_weights, bits[x.name]) for x in problem.layers),
        bops=sum(x.macs * bits[x.name] ** 2 for x in problem.layers),
        objective=sum(omega[x.name][bits[x.name]] for x in problem.mixed),
        optimal=optimal,
    )
