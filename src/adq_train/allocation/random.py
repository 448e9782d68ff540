"""Random bit allocation: the rival that knows nothing and spends as much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from adq_train.allocation.allocator import GivenAllocator
from adq_train.allocation.budget import Bits, Problem
from adq_train.allocation.neighbours import neighbours


@dataclass(frozen=True)
class RandomAllocator(GivenAllocator):
    """Bits drawn for each layer alone, then moved to the budget's edge one random step at a time.

    A step moves one layer's weights, its input or (tied) both to the next candidate. Steps go down
    while a limit is broken, then up until none fits: no layer could have more.

    Attributes:
        seed: Of the draw; the run's own seed does not change it.
    """

    seed: int = 0

    @property
    def name(self) -> str:
        """The allocator's name in ``allocation.json``."""
        return f"random-{self.seed}"

    def bits_for(self, problem: Problem) -> dict[str, Bits]:
        """Bits of every mixed layer by name."""
        random = np.random.default_rng(self.seed)
        pinned = problem.pinned_bits()

        def fits(bits: dict[str, Bits]) -> bool:
            return not problem.broken({**bits, **pinned})

        def one_of(choices: list[dict[str, Bits]]) -> dict[str, Bits]:
            return choices[random.integers(len(choices))]

        options = {x.name: problem.options(x) for x in problem.mixed}
        now = {name: x[random.integers(len(x))] for name, x in options.items()}
        while not fits(now):
            now = one_of(list(_steps(problem, now, -1)))
        while higher := [x for x in _steps(problem, now, 1) if fits(x)]:
            now = one_of(higher)
        return now


def _steps(problem: Problem, now: dict[str, Bits], by: int) -> Iterator[dict[str, Bits]]:
    """The allocations in which one layer has the next candidate, upwards (1) or downwards (-1)."""
    for layer in problem.mixed:
        bits = now[layer.name]
        for other in neighbours(bits, problem.widths(layer), problem.tied):
            if (sum(other) - sum(bits)) * by > 0:
                yield {**now, layer.name: other}
