"""Exact bit allocation: a multiple-choice knapsack solved as an integer program."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from adq_train.allocation.budget import Problem
from adq_train.artifacts import SensitivityTable
from adq_train.errors import UserError


@dataclass(frozen=True)
class IlpAllocator:
    """Minimises Σ_l Ω[l, b_l] within the budget, with HiGHS (method.md 3).

    One binary variable for each layer and candidate, exactly one of them set per layer. Costs are
    whole numbers, divided by their greatest common divisor, so that the solver's tolerances
    cannot blur a limit; the result is checked in exact arithmetic all the same.

    Attributes:
        time_limit_seconds: After this time the best allocation found is taken, and
            ``allocation.json`` says that it is not proven optimal.
    """

    time_limit_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.time_limit_seconds > 0:
            raise ValueError(
                f"time_limit_seconds must be more than 0, got {self.time_limit_seconds}"
            )

    @property
    def name(self) -> str:
        """The allocator's name in ``allocation.json``."""
        return "ilp"

    def choose(self, problem: Problem, table: SensitivityTable) -> tuple[dict[str, int], bool]:
        """Bits of every mixed layer by name, and whether they are proven optimal.

        Raises:
            UserError: The solver found no allocation in time.
        """
        omega = {x.name: x.sensitivity for x in table.layers}
        mixed, candidates = problem.mixed, problem.candidates
        shape = (len(mixed), len(candidates))
        objective = np.array([[omega[x.name][b] for b in candidates] for x in mixed])
        # HiGHS stops at an absolute gap of 1e-6, which must mean nothing beside the objective.
        scale = np.abs(objective).max() or 1.0
        one_each = np.kron(np.eye(len(mixed)), np.ones(len(candidates)))
        constraints = [LinearConstraint(one_each, 1, 1)]

        rows: list[tuple[np.ndarray, int]] = []
        for limit in problem.limits():
            costs = np.array([[limit.cost(x, b) for b in candidates] for x in mixed], dtype=object)
            spent = sum(limit.cost(x, problem.pinned[x.name]) for x in problem.layers
                        if x.name in problem.pinned)  # fmt: skip
            divisor = math.gcd(*costs.ravel()) or 1
            rows.append((costs // divisor, (limit.bound - spent) // divisor))

        slack = [0] * len(rows)
        for _ in range(20):
            limits = [
                # Sums are whole: half a unit more admits the same ones, however they round.
                LinearConstraint(costs.astype(float).ravel(), -np.inf, bound - extra + 0.5)
                for (costs, bound), extra in zip(rows, slack, strict=True)
            ]
            solution = milp(
                objective.ravel() / scale * 1e4,
                constraints=constraints + limits,
                integrality=np.ones(objective.size),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0, "time_limit": self.time_limit_seconds},
            )
            if solution.x is None:
                raise UserError(
                    f"allocator: the solver found no allocation ({solution.message}); raise "
                    "allocator.time_limit_seconds or the budget"
                )
            picked = solution.x.reshape(shape).argmax(1)
            over = [
                int(costs[np.arange(len(mixed)), picked].sum()) - bound for costs, bound in rows
            ]
            if all(excess <= 0 for excess in over):
                optimal = bool(solution.status == 0 and not any(slack))
                bits = {x.name: candidates[i] for x, i in zip(mixed, picked, strict=True)}
                return bits, optimal
            # Only huge coefficients get here: an x of 0.999999 hid a broken limit. Tighten it.
            slack = [s + max(0, excess) for s, excess in zip(slack, over, strict=True)]
        raise UserError("allocator: the solver cannot meet the budget exactly; change it slightly")
