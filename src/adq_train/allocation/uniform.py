"""Uniform bit allocation: the rival that gives every layer the same bits."""

from __future__ import annotations

from dataclasses import dataclass

from adq_train.allocation.allocator import GivenAllocator
from adq_train.allocation.budget import Bits, Problem
from adq_train.errors import UserError


@dataclass(frozen=True)
class UniformAllocator(GivenAllocator):
    """The same bit-width for the weights and the input of every layer that is not pinned.

    Attributes:
        bit_width: The bits; None takes the largest that every layer may get within the budget.
    """

    name = "uniform"
    bit_width: int | None = None

    def __post_init__(self) -> None:
        if self.bit_width is not None and not 2 <= self.bit_width <= 8:
            raise ValueError(f"bit_width must lie in 2 … 8, got {self.bit_width}")

    def bits_for(self, problem: Problem) -> dict[str, Bits]:
        """Bits of every mixed layer by name.

        Raises:
            UserError: The given bit-width is no candidate, or breaks the budget.
        """
        shared = set.intersection(*(set(problem.widths(x)) for x in problem.mixed))
        if not shared:
            raise UserError(
                "allocator: uniform needs a bit-width that every layer may get; add one to all "
                "lists of bits.candidates_per_layer"
            )
        if self.bit_width is not None and self.bit_width not in shared:
            raise UserError(
                f"allocator.bit_width: {self.bit_width} is not among bits.candidates="
                f"{sorted(shared)}; add it there, and to bits.candidates_per_layer"
            )
        allowed = shared if self.bit_width is None else {self.bit_width}
        for bits in sorted(allowed, reverse=True):
            chosen = {x.name: Bits(bits, bits) for x in problem.mixed}
            broken = problem.broken({**chosen, **problem.pinned_bits()})
            if not broken:
                return chosen
        raise UserError(
            f"allocator.bit_width: {bits} bits everywhere exceed the budget ({'; '.join(broken)}); "
            "raise it, or set bit_width to a smaller candidate or null"
        )
