import numpy as np
import pytest

from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Bits, Budget, Problem
from adq_train.allocation.random import RandomAllocator
from adq_train.artifacts import LayerInfo


def problem_of(seed, tied):
    random = np.random.default_rng(seed)
    layers = tuple(LayerInfo(str(n), *random.integers(1, 500, 3).tolist()) for n in range(6))
    budget = Budget(
        average_weight_bits=random.uniform(2, 4),
        average_activation_bits=random.uniform(2, 4) if seed % 2 else None,
        bops=random.uniform(40_000, 80_000) if seed % 3 else None,
    )
    few = {"1": (2, 4), "2": (3,)} if seed % 4 == 0 else {}
    pinned = {"0": 8} if seed % 5 == 0 and seed % 3 == 0 else {}
    return Problem(layers, pinned, (2, 3, 4), budget, few, tied=tied)


@pytest.mark.parametrize("tied", [True, False])
def test_within_the_budget_and_no_layer_could_have_more(make_table, tied):
    met = 0
    for seed in range(30):
        problem = problem_of(seed, tied)
        least = {x.name: problem.options(x)[0] for x in problem.layers}
        if problem.broken(least):
            continue
        met += 1
        chosen = RandomAllocator(seed).bits_for(problem)
        assert chosen == RandomAllocator(seed).bits_for(problem)
        whole = {**chosen, **problem.pinned_bits()}
        assert not problem.broken(whole)
        for layer in problem.mixed:
            assert chosen[layer.name] in problem.options(layer)
            for other in problem.options(layer):
                more = sum(other) > sum(chosen[layer.name])
                above = all(a >= b for a, b in zip(other, chosen[layer.name], strict=True))
                if more and above:
                    assert problem.broken({**whole, layer.name: other})
    assert met > 15


def test_seeds_draw_others_and_all_bits_are_met(make_table):
    layers = tuple(LayerInfo(str(n), 100, 100, 100) for n in range(8))
    problem = Problem(layers, {}, (2, 3, 4), Budget(3.0))
    drawn = [RandomAllocator(seed).bits_for(problem) for seed in range(20)]
    assert len({tuple(x.values()) for x in drawn}) > 15
    assert {bits for x in drawn for bits in x.values()} == {Bits(b, b) for b in (2, 3, 4)}
    assert all(sum(b.weights for b in x.values()) == 24 for x in drawn)  # the budget is spent
    table = make_table(layers, [(1, 2, 3)] * 8)
    allocation = allocate(RandomAllocator(3), problem, table)
    assert (allocation.allocator, allocation.optimal) == ("random-3", False)
    assert {x.name: Bits(x.weight_bits, x.activation_bits) for x in allocation.layers} == drawn[3]
