"""Exact bit allocation: a multiple-choice knapsack solved as an integer program."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from adq_train.allocation.allocator import Allocator, omega
from adq_train.allocation.budget import Bits, Problem
from adq_train.artifacts import SensitivityTable
from adq_train.errors import UserError


@dataclass(frozen=True)
class IlpAllocator(Allocator):
    """Minimises Σ_l Ω[l, bits_l] within the budget, with HiGHS.

    One binary variable for each layer and option (a bit-width, or a pair of widths for weights and
    input), exactly one of them set per layer; so bit operations, a product of two widths, stay
    linear. Costs are whole numbers, divided by their greatest common divisor, so that the solver's
    tolerances cannot blur a limit; the result is checked in exact arithmetic all the same. "Proven
    optimal" means: no other allocation is better by more than 1e-10 of the largest |Ω|.

    Attributes:
        time_limit_seconds: After this time the best allocation found is taken, and
            ``allocation.json`` says that it is not proven optimal.
    """

    name = "ilp"
    time_limit_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.time_limit_seconds > 0:
            raise ValueError(
                f"time_limit_seconds must be more than 0, got {self.time_limit_seconds}"
            )

    def choose(self, problem: Problem, table: SensitivityTable) -> tuple[dict[str, Bits], bool]:
        """Bits of every mixed layer by name, and whether they are proven optimal.

        Raises:
            UserError: The solver found no allocation in time.
        """
        values = omega(problem, table)
        # One column for each layer and option; the columns of a layer stand together.
        columns = [(layer, bits) for layer in problem.mixed for bits in values[layer.name]]
        objective = np.array([values[layer.name][bits] for layer, bits in columns])
        counts = [len(values[x.name]) for x in problem.mixed]
        ends = np.cumsum(counts)
        # HiGHS stops at an absolute gap of 1e-6, which must mean nothing beside the objective.
        scale = np.abs(objective).max() or 1.0
        ones, indices = np.ones(len(columns)), np.arange(len(columns))
        one_each = csr_array((ones, indices, np.array([0, *ends])))
        constraints = [LinearConstraint(one_each, 1, 1)]

        rows: list[tuple[np.ndarray, int]] = []
        pinned = problem.pinned_bits()
        for limit in problem.limits():
            costs = np.array([limit.cost(layer, bits) for layer, bits in columns], dtype=object)
            spent = limit.total([x for x in problem.layers if x.name in pinned], pinned)
            divisor = math.gcd(*costs) or 1
            rows.append((costs // divisor, (limit.bound - spent) // divisor))

        slack = [0] * len(rows)
        for _ in range(20):
            limits = [
                # Sums are whole: half a unit more admits the same ones, however they round.
                LinearConstraint(costs.astype(float)[None], -np.inf, bound - extra + 0.5)
                for (costs, bound), extra in zip(rows, slack, strict=True)
            ]
            solution = milp(
                objective / scale * 1e4,
                constraints=constraints + limits,
                integrality=ones,
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0, "time_limit": self.time_limit_seconds},
            )
            if solution.x is None:
                raise UserError(
                    f"allocator: the solver found no allocation ({solution.message}); raise "
                    "allocator.time_limit_seconds or the budget"
                )
            parts = np.split(solution.x, ends[:-1])
            picked = [
                end - len(part) + int(part.argmax()) for part, end in zip(parts, ends, strict=True)
            ]
            over = [int(costs[picked].sum()) - bound for costs, bound in rows]
            if all(excess <= 0 for excess in over):
                optimal = bool(solution.status == 0 and not any(slack))
                return {columns[i][0].name: columns[i][1] for i in picked}, optimal
            # Only huge coefficients get here: an x of 0.999999 hid a broken limit. Tighten it.
            slack = [s + max(0, excess) for s, excess in zip(slack, over, strict=True)]
        raise UserError("allocator: the solver cannot meet the budget exactly; change it slightly")
