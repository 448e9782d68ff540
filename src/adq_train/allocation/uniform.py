"""Uniform bit allocation: the rival that gives every layer the same bits."""

from __future__ import annotations

from dataclasses import dataclass

from adq_train.allocation.budget import Problem
from adq_train.artifacts import SensitivityTable
from adq_train.errors import UserError


@dataclass(frozen=True)
class UniformAllocator:
    """The same bit-width for every layer that is not pinned.

    Attributes:
        bit_width: The bits; None takes the largest candidate within the budget.
    """

    bit_width: int | None = None

    def __post_init__(self) -> None:
        if self.bit_width is not None and not 2 <= self.bit_width <= 8:
            raise ValueError(f"bit_width must lie in 2 … 8, got {self.bit_width}")

    @property
    def name(self) -> str:
        """The allocator's name in ``allocation.json``."""
        return "uniform"

    def choose(self, problem: Problem, table: SensitivityTable) -> tuple[dict[str, int], bool]:
        """Bits of every mixed layer by name; never proven optimal.

        Raises:
            UserError: The given bit-width is no candidate, or breaks the budget.
        """
        if self.bit_width is not None and self.bit_width not in problem.candidates:
            raise UserError(
                f"allocator.bit_width: {self.bit_width} is not among bits.candidates="
                f"{list(problem.candidates)}; add it there"
            )
        allowed = problem.candidates if self.bit_width is None else (self.bit_width,)
        for bits in sorted(allowed, reverse=True):
            cost = {
                limit: sum(limit.cost(x, problem.pinned.get(x.name, bits)) for x in problem.layers)
                for limit in problem.limits()
            }
            if all(total <= limit.bound for limit, total in cost.items()):
                return {x.name: bits for x in problem.mixed}, False
        raise UserError(
            f"allocator.bit_width: {self.bit_width} bits everywhere exceed the budget "
            f"{problem.budget.limits()}; raise it, or set it to null"
        )
