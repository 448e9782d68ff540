"""Bits as given, by layer name or pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adq_train.allocation.allocator import GivenAllocator
from adq_train.allocation.budget import Bits, Problem
from adq_train.allocation.patterns import listed, match
from adq_train.errors import UserError

SMALLEST, LARGEST = 2, 8


@dataclass(frozen=True)
class FixedAllocator(GivenAllocator):
    """The bits that a person chose; any from 2 to 8, also such as were not measured.

    Pinned layers keep their pinned bits.

    Attributes:
        bits: By layer name or shell pattern: a bit-width, or a pair for weights and input. Every
            layer that is not pinned must be matched, and none twice.
    """

    name = "fixed"
    bits: dict[str, int | list[int]]

    def __post_init__(self) -> None:
        if not isinstance(self.bits, Mapping) or not self.bits:
            raise ValueError(f"bits must map layer names to bits, {{'*': 4}}, got {self.bits!r}")
        for pattern, given in self.bits.items():
            if not _is_bits(given):
                raise ValueError(
                    f"bits.{pattern} must be {SMALLEST} … {LARGEST}, or [weights, activations] of "
                    f"such, got {given!r}"
                )

    def bits_for(self, problem: Problem) -> dict[str, Bits]:
        """Bits of every mixed layer by name.

        Raises:
            UserError: A pattern or a layer is unmatched, or the bits break the budget.
        """
        matched = match("allocator.bits", self.bits, [x.name for x in problem.layers])
        left_out = [x.name for x in problem.mixed if x.name not in matched]
        if left_out:
            raise UserError(
                f"allocator.bits: no pattern of {listed(self.bits)} matches {listed(left_out)}; "
                "give them bits, or pin them in bits.pinned"
            )
        given = {name: _pair(self.bits[pattern]) for name, pattern in matched.items()}
        chosen = {x.name: given[x.name] for x in problem.mixed}
        pinned = problem.pinned_bits()
        for pattern in set(matched.values()) - {matched[name] for name in chosen}:
            if any(given[x] != pinned[x] for x, by in matched.items() if by == pattern):
                raise UserError(
                    f"allocator.bits: {pattern!r} matches only pinned layers, which have other "
                    "bits; change bits.first_last or bits.pinned, or leave it out"
                )
        require_within(problem, chosen, "allocator.bits")
        return chosen


def _pair(given: int | list[int]) -> Bits:
    return Bits(given, given) if isinstance(given, int) else Bits(*given)


def require_within(problem: Problem, chosen: Mapping[str, Bits], setting: str) -> None:
    """Refuses bits of the mixed layers that break the budget.

    Raises:
        UserError: Names every limit that they break, and by how much.
    """
    broken = problem.broken({**chosen, **problem.pinned_bits()})
    if broken:
        raise UserError(
            f"{setting}: these bits exceed the budget ({'; '.join(broken)}); raise it, or take "
            "fewer bits"
        )


def _is_bits(value: Any) -> bool:
    """Whether a value is a bit-width or a pair of them."""
    widths = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(b) is int and SMALLEST <= b <= LARGEST for b in widths)
