import pytest

from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Bits
from adq_train.allocation.fixed import FixedAllocator
from adq_train.allocation.neighbours import neighbours, steps

ROWS = [(9.0, 5.0, 0.0), (0.3, 0.2, 0.1)]


def test_what_other_bits_would_change(make_problem, make_table):
    problem = make_problem(average_weight_bits=3, candidates_by_layer={"head": (2, 4)})
    table = make_table(problem.mixed, ROWS)
    allocation = allocate(FixedAllocator({"body": 3, "head": 2}), problem, table)
    less, more, head = steps(problem, table, allocation)
    assert (less.layer, less.now, less.then) == ("body", Bits(3, 3), Bits(2, 2))
    assert (less.loss, less.size_bytes, less.bops) == (pytest.approx(4), -13, 3000 * (4 - 9))
    assert (more.loss, more.size_bytes, more.bops) == (pytest.approx(-5), 12, 3000 * (16 - 9))
    assert (head.layer, head.then, head.loss) == ("head", Bits(4, 4), pytest.approx(-0.2))
    # 302 and 502 of at most 453 weight bits
    assert (less.within_budget, more.within_budget) == (True, False)


def test_separate_bits_change_one_at_a_time(make_problem, make_table):
    problem = make_problem(average_weight_bits=3, tied=False)
    table = make_table(problem.mixed, ROWS, activations=[(3, 2, 1), (0, 0, 0)])
    allocation = allocate(FixedAllocator({"body": [2, 4], "head": 2}), problem, table)
    weights, inputs, *_ = steps(problem, table, allocation)
    assert (weights.then, weights.size_bytes) == (Bits(3, 4), 13)
    assert weights.loss == pytest.approx(-4)
    assert (inputs.then, inputs.size_bytes) == (Bits(2, 3), 0)
    assert inputs.loss == pytest.approx(1)


def test_bits_that_were_not_measured_have_neighbours_without_a_loss(make_problem, make_table):
    problem = make_problem(average_weight_bits=8)
    table = make_table(problem.mixed, ROWS)
    allocation = allocate(FixedAllocator({"body": 6, "head": [2, 3]}), problem, table)
    found = list(steps(problem, table, allocation))
    assert [x.then for x in found] == [(4, 4), (3, 3), (2, 2), (2, 4)]
    assert all(x.loss is None for x in found)


def test_neighbours_of_the_ends():
    assert neighbours(Bits(2, 2), (2, 4), tied=True) == [(4, 4)]
    assert neighbours(Bits(4, 4), (2, 4), tied=True) == [(2, 2)]
    assert neighbours(Bits(4, 4), (4,), tied=False) == []
