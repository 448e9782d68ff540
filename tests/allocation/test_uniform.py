import pytest

from adq_train.allocation.allocator import allocate
from adq_train.allocation.uniform import UniformAllocator
from adq_train.errors import UserError


@pytest.fixture
def bits_within(make_problem, make_table):
    """Bits of the three layers within a budget."""

    def choose(bit_width=None, **budget):
        problem = make_problem(**budget)
        table = make_table(problem.mixed, [(1, 2, 3)] * 2)
        allocation = allocate(UniformAllocator(bit_width), problem, table)
        assert (allocation.allocator, allocation.optimal) == ("uniform", False)
        return [x.weight_bits for x in allocation.layers]

    return choose


@pytest.mark.parametrize(
    ("budget", "bits"),
    [
        ({"average_weight_bits": 4}, 4),
        ({"average_weight_bits": 3.99}, 3),
        # 27 bytes of the pinned layer, and 38 + 20 at 3 bits
        ({"model_size_bytes": 85}, 3),
        ({"model_size_bytes": 84}, 2),
        ({"average_weight_bits": 4, "model_size_bytes": 84}, 2),
        ({"bops": 64_000 + 16 * 3051}, 4),
        ({"bops": 64_000 + 16 * 3051 - 1}, 3),
        ({}, 4),
    ],
)
def test_the_largest_candidate_within_the_budget(bits_within, budget, bits):
    assert bits_within(**budget) == [8, bits, bits]


def test_given_bits(bits_within):
    assert bits_within(2, average_weight_bits=4) == [8, 2, 2]


def test_given_bits_beyond_the_budget(bits_within):
    with pytest.raises(UserError, match="4 bits everywhere exceed the budget"):
        bits_within(4, average_weight_bits=3)


def test_given_bits_that_are_no_candidate(bits_within):
    with pytest.raises(UserError, match=r"5 is not among bits\.candidates=\[2, 3, 4\]"):
        bits_within(5, average_weight_bits=8)


@pytest.mark.parametrize("bit_width", [1, 9])
def test_bit_width_out_of_range(bit_width):
    with pytest.raises(ValueError, match="bit_width"):
        UniformAllocator(bit_width)


def test_layers_with_candidates_of_their_own_share_one(make_problem):
    table = None  # the choice does not depend on it
    problem = make_problem(candidates_by_layer={"head": (2, 3)}, average_weight_bits=4)
    chosen, _ = UniformAllocator().choose(problem, table)
    assert chosen == {"body": (3, 3), "head": (3, 3)}
    problem = make_problem(candidates_by_layer={"head": (3,), "body": (2, 4)}, bops=1e9)
    with pytest.raises(UserError, match="a bit-width that every layer may get"):
        UniformAllocator().check(problem)


def test_bits_beyond_the_budget_show_before_any_training(make_problem):
    UniformAllocator(2).check(make_problem(average_weight_bits=3))
    with pytest.raises(UserError, match=r"average_weight_bits: 4 of 3"):
        UniformAllocator(4).check(make_problem(average_weight_bits=3))
