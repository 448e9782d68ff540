from itertools import product

import pytest

from adq_train.allocation.budget import Budget, Problem
from adq_train.allocation.greedy import GreedyAllocator
from adq_train.allocation.ilp import IlpAllocator
from adq_train.allocation.pareto import front, solve, sweep, uniform
from adq_train.artifacts import LayerInfo

LAYERS = tuple(LayerInfo(name, n, m, 5) for name, n, m in (("a", 4, 9), ("b", 7, 2), ("c", 2, 5)))
ROWS = [(8.0, 3.0, 2.0), (5.0, 4.5, 1.0), (4.0, 1.0, 0.5)]


def dominant(points):
    """Points that no other one equals or beats in both."""
    return sorted(
        x for x in set(points) if not any(y != x and y[0] <= x[0] and y[1] <= x[1] for y in points)
    )


@pytest.mark.parametrize(
    ("over", "cost"),
    [
        ("average_weight_bits", lambda x, b: x.num_weights * b / 13),
        ("bops", lambda x, b: x.macs * b * b),
    ],
)
def test_all_budgets_give_the_front_of_all_allocations(make_table, over, cost):
    problem = Problem(LAYERS, {}, (2, 3, 4), Budget())
    everything = [
        (
            round(sum(cost(x, b) for x, b in zip(LAYERS, bits, strict=True)), 9),
            round(sum(row[b - 2] for row, b in zip(ROWS, bits, strict=True)), 9),
        )
        for bits in product((2, 3, 4), repeat=3)
    ]
    count = 1 + (26 if over == "average_weight_bits" else 16 * 12)
    solved = list(solve(IlpAllocator(), problem, make_table(LAYERS, ROWS), over, count))
    found = [(round(getattr(x, over), 9), round(x.objective, 9)) for x in front(solved, over)]
    assert found == dominant(everything)


def test_a_sweep_goes_from_the_least_to_the_most(make_problem):
    assert sweep(make_problem(), "model_size_bytes", 3) == [65, 84, 103]
    assert sweep(make_problem(tied=False), "average_activation_bits", 2) == [2, 4]


def test_other_limits_hold_besides(make_problem, make_table):
    problem = make_problem(bops=64_000 + 9 * 3051)
    table = make_table(problem.mixed, [(9, 5, 0), (3, 2, 1)])
    solved = list(solve(GreedyAllocator(), problem, table, "average_weight_bits", 5))
    assert len(solved) == 5
    assert max(x.bops for x in solved) <= 64_000 + 9 * 3051
    assert [x.average_weight_bits for x in uniform(problem, table)] == [2, 3]
