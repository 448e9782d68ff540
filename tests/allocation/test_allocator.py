from dataclasses import replace

import pytest

from adq_train.allocation.allocator import Allocator, allocate, objective, omega
from adq_train.allocation.budget import Bits
from adq_train.allocation.greedy import GreedyAllocator
from adq_train.allocation.ilp import IlpAllocator
from adq_train.allocation.uniform import UniformAllocator
from adq_train.artifacts import LayerBits
from adq_train.errors import UserError


class Given(Allocator):
    """An allocator that gives the bits it was told to give."""

    name = "given"

    def __init__(self, **bits):
        self.bits = bits

    def choose(self, problem, table):
        return {name: Bits(b, b) for name, b in self.bits.items()}, False


def test_an_allocation_accounts_for_its_cost(make_problem, make_table):
    problem = make_problem(average_weight_bits=3, model_size_bytes=90)
    # The table may hold pinned layers too; they do not count.
    table = make_table(problem.layers, [(9, 9, 9), (1.5, 1.0, 0.5), (0.4, 0.2, 0.1)])
    allocation = allocate(Given(body=3, head=2), problem, table)
    assert allocation.layers == (
        LayerBits("stem", 8, 8),
        LayerBits("body", 3, 3),
        LayerBits("head", 2, 2),
    )
    assert allocation.average_weight_bits == pytest.approx((300 + 102) / 151)
    assert allocation.average_weight_bits_all_layers == pytest.approx((216 + 300 + 102) / 178)
    assert allocation.average_activation_bits == pytest.approx((192 + 34) / 81)
    assert allocation.model_size_bytes == 27 + 38 + 13
    assert allocation.bops == 64_000 + 27_000 + 204
    assert allocation.objective == pytest.approx(1.0 + 0.4)
    assert allocation.budget == {"average_weight_bits": 3.0, "model_size_bytes": 90.0}
    assert (allocation.allocator, allocation.optimal) == ("given", False)


def test_an_allocator_that_breaks_a_limit_is_caught(make_problem, make_table):
    problem = make_problem(average_weight_bits=3)
    table = make_table(problem.mixed, [(1, 1, 1)] * 2)
    with pytest.raises(AssertionError, match=r"given broke .*average_weight_bits"):
        allocate(Given(body=4, head=2), problem, table)


def test_allocate_refuses_a_budget_out_of_reach(make_problem, make_table):
    problem = make_problem(model_size_bytes=1)
    with pytest.raises(UserError, match=r"budget\.model_size_bytes"):
        allocate(Given(), problem, make_table(problem.mixed, [(1, 1, 1)] * 2))


def test_check_is_that_of_the_problem_unless_there_is_more(make_problem):
    Given().check(make_problem(model_size_bytes=100))
    with pytest.raises(UserError, match=r"budget\.model_size_bytes"):
        Given().check(make_problem(model_size_bytes=1))


ROWS = [(9.0, 5.0, 0.0), (0.3, 0.2, 0.1)]


def test_the_effects_of_weights_and_input_add_up(make_problem, make_table):
    problem = make_problem(tied=False, candidates_by_layer={"head": (2, 4)})
    table = make_table(problem.mixed, ROWS, activations=[(3.0, 2.0, 1.0), (0.5, 0.25, 0.0)])
    values = omega(problem, table)
    assert values["body"][Bits(2, 4)] == 9 + 1
    assert values["body"][Bits(4, 2)] == 0 + 3
    assert values["head"] == {(2, 2): 0.8, (2, 4): 0.3, (4, 2): 0.6, (4, 4): 0.1}
    tied = make_problem()
    assert omega(tied, table)["body"] == {(2, 2): 12, (3, 3): 7, (4, 4): 1}
    chosen = {"body": Bits(2, 4), "head": Bits(4, 2)}
    assert objective(problem, table, chosen) == pytest.approx(10 + 0.6)


def test_a_table_of_both_together_has_no_separate_bits(make_problem, make_table):
    problem = make_problem(tied=False)
    table = make_table(problem.mixed, ROWS)
    with pytest.raises(UserError, match=r"bits\.tied: .*sensitivity\.tensors=separate"):
        omega(problem, table)
    assert objective(problem, table, {"body": Bits(2, 4), "head": Bits(2, 2)}) is None
    assert objective(problem, table, {"body": Bits(2, 2), "head": Bits(2, 2)}) == 9.3


def test_bits_that_were_not_measured(make_problem, make_table):
    problem = make_problem(candidates_by_layer={"head": (5, 6)})
    table = make_table(problem.mixed, ROWS)
    with pytest.raises(UserError, match=r"head was not measured at 5 bits, only at \[2, 3, 4\]"):
        omega(problem, table)
    assert objective(problem, table, {"body": Bits(5, 5), "head": Bits(2, 2)}) is None


def test_a_layer_that_was_not_measured(make_problem, make_table):
    problem = make_problem()
    with pytest.raises(UserError, match="says nothing about head"):
        omega(problem, make_table(problem.mixed[:1], ROWS[:1]))


@pytest.mark.parametrize("allocator", [IlpAllocator(), GreedyAllocator()], ids=lambda x: x.name)
def test_nothing_is_chosen_by_a_table_of_zeros(allocator, make_problem, make_table):
    problem = make_problem(average_weight_bits=3)
    zeros = make_table(problem.mixed, [(0, 0, 0)] * 2)
    with pytest.raises(UserError, match=r"every Ω of made up is 0.*criterion=mse.*uniform"):
        allocate(allocator, problem, zeros)
    one = make_table(problem.mixed, [(0, 0, 0), (0.1, 0, 0)])
    assert allocate(allocator, problem, one).bits()["head"].weight_bits > 2
    assert allocate(UniformAllocator(), problem, zeros).objective == 0
    only = replace(problem, candidates=(3,))
    assert allocate(allocator, only, make_table(problem.mixed, [(0, 0, 0)] * 2)).objective == 0


def test_what_limits_an_optimum_goes_with_it_where_it_was_chosen_by_the_table(
    make_problem, make_table
):
    problem = make_problem(average_weight_bits=3)
    sure = make_table(problem.layers, [(9, 0, 0), *ROWS])
    errors = dict.fromkeys((2, 3, 4), 1.0)
    # The pinned layer, which is sure, is not chosen for.
    noisy = replace(
        sure,
        layers=(
            sure.layers[0],
            *(
                replace(x, sensitivity={2: 0.5, 3: 0.4, 4: 0.3}, standard_error=errors)
                for x in sure.layers[1:]
            ),
        ),
    )
    chance = replace(sure, caveat="the float model is at chance")
    for table, expected in (
        (sure, None),
        (noisy, "which are within noise"),
        (chance, "but the float model is at chance"),
    ):
        found = allocate(IlpAllocator(), problem, table)
        assert (found.optimal, found.caveat) == (True, expected)
        assert allocate(UniformAllocator(), problem, table).caveat is None
