import numpy as np
import pytest

from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Bits, Budget, Problem
from adq_train.allocation.greedy import GreedyAllocator
from adq_train.allocation.ilp import IlpAllocator
from adq_train.artifacts import LayerInfo


def reference(problem, values):
    """The rule of the docstring, written down once more without arrays."""
    now = {x.name: problem.options(x)[0] for x in problem.mixed}
    while True:
        spent = {**now, **problem.pinned_bits()}
        left = [limit.bound - limit.total(problem.layers, spent) for limit in problem.limits()]
        best, best_worth = None, 0.0
        for layer in problem.mixed:
            old = now[layer.name]
            for bits in problem.options(layer):
                gain = values[layer.name][old] - values[layer.name][bits]
                extra = [
                    limit.cost(layer, bits) - limit.cost(layer, old) for limit in problem.limits()
                ]
                fits = all(x <= rest for x, rest in zip(extra, left, strict=True))
                raised = bits[0] >= old[0] and bits[1] >= old[1]
                if not (raised and fits and gain > 0):
                    continue
                price = max(x / max(rest, 1) for x, rest in zip(extra, left, strict=True))
                worth = gain / price if price else float("inf")
                if worth > best_worth:
                    best, best_worth = (layer.name, bits), worth
        if best is None:
            return now
        now[best[0]] = best[1]


@pytest.mark.parametrize("tied", [True, False])
def test_the_rule_and_never_better_than_the_optimum(make_table, tied):
    for seed in range(20):
        random = np.random.default_rng([seed, tied])
        layers = tuple(LayerInfo(str(n), *random.integers(1, 500, 3).tolist()) for n in range(6))
        budget = Budget(
            average_weight_bits=random.uniform(2, 4),
            average_activation_bits=random.uniform(2, 4) if seed % 2 else None,
            bops=random.uniform(12_000, 40_000) if seed % 3 else None,
        )
        problem = Problem(layers, {"0": 8} if seed % 5 == 0 else {}, (2, 3, 4), budget, tied=tied)
        if problem.pinned:
            problem = Problem(layers, problem.pinned, (2, 3, 4), Budget(3.1), tied=tied)
        rows, inputs = random.normal(size=(2, len(problem.mixed), 3)).cumsum(2)[..., ::-1].tolist()
        table = make_table(problem.mixed, rows, activations=inputs)
        values = {
            x.name: {
                bits: rows[n][bits[0] - 2] + inputs[n][bits[1] - 2] for bits in problem.options(x)
            }
            for n, x in enumerate(problem.mixed)
        }
        greedy = allocate(GreedyAllocator(), problem, table)
        assert (greedy.allocator, greedy.optimal) == ("greedy", False)
        expected = reference(problem, values)
        assert {x.name: (x.weight_bits, x.activation_bits) for x in greedy.layers} == {
            **expected, **problem.pinned_bits()
        }  # fmt: skip
        assert allocate(IlpAllocator(), problem, table).objective <= greedy.objective + 1e-9


def test_the_classic_trap(make_table):
    """The small layer looks best per bit, and then the large one no longer fits."""
    layers = (LayerInfo("small", 10, 1, 1), LayerInfo("large", 20, 1, 1))
    problem = Problem(layers, {}, (2, 4), Budget(average_weight_bits=100 / 30))
    table = make_table(layers, [(1.1, 0), (2, 0)], (2, 4))
    greedy, best = (allocate(x, problem, table) for x in (GreedyAllocator(), IlpAllocator()))
    assert (greedy.objective, best.objective) == (2, pytest.approx(1.1))


def test_raises_without_a_price_come_first_and_gains_alone_are_taken(make_problem, make_table):
    problem = make_problem(tied=False, average_weight_bits=2)
    rows = [(9.0, 5.0, 0.0), (0.3, 0.2, 0.1)]
    table = make_table(problem.mixed, rows, activations=[(3, 2, 2.5), (0, 0, 0)])
    chosen, _ = GreedyAllocator().choose(problem, table)
    assert chosen == {"body": Bits(2, 3), "head": Bits(2, 2)}


def test_without_a_budget_every_layer_gets_its_best(make_problem, make_table):
    problem = make_problem()
    table = make_table(problem.mixed, [(3, 1, 2), (3, 2, 1)])
    chosen, _ = GreedyAllocator().choose(problem, table)
    assert chosen == {"body": Bits(3, 3), "head": Bits(4, 4)}
