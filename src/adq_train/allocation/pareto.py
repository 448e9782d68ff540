"""The trade-off between predicted loss and cost: many budgets solved from one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from adq_train.allocation.allocator import Allocator, allocate
from adq_train.allocation.budget import Bits, Budget, Problem
from adq_train.allocation.uniform import UniformAllocator
from adq_train.artifacts import BitAllocation, SensitivityTable

BUDGETS = tuple(x.name for x in fields(Budget))


def sweep(problem: Problem, over: str, count: int) -> list[float]:
    """Evenly spaced budgets from the least that can be reached to what the most bits cost.

    Args:
        problem: Its limits other than ``over`` decide what can be reached at all.
        over: The budget to vary.
        count: How many, at least 2.
    """
    (limit,) = replace(problem, budget=Budget(**{over: 0})).limits()
    ends: list[int] = []
    for end in (0, -1):
        bits: dict[str, Bits] = {x.name: problem.options(x)[end] for x in problem.layers}
        ends.append(limit.total(problem.layers, bits))
    least, most = ends
    return [(least + (most - least) * i // (count - 1)) / limit.unit for i in range(count)]


def solve(
    allocator: Allocator, problem: Problem, table: SensitivityTable, over: str, count: int
) -> Iterator[BitAllocation]:
    """The allocator's choice at each budget of :func:`sweep`, from the least up."""
    for amount in sweep(problem, over, count):
        budget = replace(problem.budget, **{over: amount})
        yield allocate(allocator, replace(problem, budget=budget), table)


def uniform(problem: Problem, table: SensitivityTable) -> list[BitAllocation]:
    """The same bits everywhere, for each width that every layer may get within the limits."""
    shared = set.intersection(*(set(problem.widths(x)) for x in problem.mixed))
    found = []
    for width in sorted(shared):
        bits = {x.name: Bits(width, width) for x in problem.mixed}
        if not problem.broken({**bits, **problem.pinned_bits()}):
            found.append(allocate(UniformAllocator(width), problem, table))
    return found


def front(allocations: Sequence[BitAllocation], over: str) -> list[BitAllocation]:
    """Those that nothing cheaper, or equally cheap, equals or beats; cheapest first.

    Args:
        allocations: Each with an objective.
        over: The figure that counts as cost.
    """
    best: list[BitAllocation] = []
    for x in sorted(allocations, key=lambda x: (getattr(x, over), x.objective)):
        assert x.objective is not None
        if not best or x.objective < (best[-1].objective or 0.0):
            best.append(x)
    return best
