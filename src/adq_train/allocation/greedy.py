"""Greedy bit allocation: the rival that spends the budget step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adq_train.allocation.allocator import Allocator, omega
from adq_train.allocation.budget import Bits, Problem
from adq_train.artifacts import SensitivityTable


@dataclass(frozen=True)
class GreedyAllocator(Allocator):
    """Starts from the least bits and takes, again and again, the best raise of one layer.

    A raise moves one layer to any option with no fewer bits for weights and input. Its gain is by
    how much Ω falls; its price is the largest share that it takes of what is left of any budget.
    Only raises that gain and fit are looked at; the one with the most gain per price is taken (a
    raise without a price before all others), the earliest layer and fewest bits among equals. The
    end is reached when no raise is left.
    """

    name = "greedy"

    def choose(self, problem: Problem, table: SensitivityTable) -> tuple[dict[str, Bits], bool]:
        """Bits of every mixed layer by name; never proven optimal.

        Raises:
            UserError: The table does not hold what is needed.
        """
        values = omega(problem, table)
        columns = [(layer, bits) for layer in problem.mixed for bits in values[layer.name]]
        counts = [len(values[x.name]) for x in problem.mixed]
        owner = np.repeat(np.arange(len(counts)), counts)
        loss = np.array([values[layer.name][bits] for layer, bits in columns])
        widths = np.array([bits for _, bits in columns])
        limits = problem.limits()
        costs = np.array([[limit.cost(x, b) for x, b in columns] for limit in limits], dtype=object)
        costs = costs.reshape(len(limits), len(columns))

        now = np.cumsum([0, *counts[:-1]])  # a layer's first option has the least bits
        pinned = problem.pinned_bits()
        ends = [x for x in problem.layers if x.name in pinned]
        left = [
            limit.bound - limit.total(ends, pinned) - sum(cost[now])
            for limit, cost in zip(limits, costs, strict=True)
        ]
        while True:
            gain = loss[now][owner] - loss
            possible = (gain > 0) & (widths >= widths[now][owner]).all(1)
            price = np.zeros(len(columns))
            for cost, rest in zip(costs, left, strict=True):
                extra = cost - cost[now][owner]
                possible &= (extra <= rest).astype(bool)
                price = np.maximum(price, extra.astype(float) / max(rest, 1))
            if not possible.any():
                return {columns[i][0].name: columns[i][1] for i in now}, False
            with np.errstate(divide="ignore"):
                worth = np.where(possible, gain / np.where(possible, price, 1), -np.inf)
            step = int(worth.argmax())
            old = now[owner[step]]
            left = [rest - (c[step] - c[old]) for rest, c in zip(left, costs, strict=True)]
            now[owner[step]] = step
