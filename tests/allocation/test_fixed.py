import pytest

from adq_train.allocation.allocator import allocate
from adq_train.allocation.fixed import FixedAllocator
from adq_train.artifacts import LayerBits
from adq_train.errors import UserError

ROWS = [(9.0, 5.0, 0.0), (0.3, 0.2, 0.1)]


def test_bits_as_given_beside_the_pinned_ones(make_problem, make_table):
    problem = make_problem(average_weight_bits=4)
    table = make_table(problem.mixed, ROWS)
    allocation = allocate(FixedAllocator({"bo*": 3, "head": 4}), problem, table)
    assert allocation.layers == (
        LayerBits("stem", 8, 8),
        LayerBits("body", 3, 3),
        LayerBits("head", 4, 4),
    )
    assert allocation.objective == pytest.approx(5.1)
    assert (allocation.allocator, allocation.optimal) == ("fixed", False)


def test_pairs_and_widths_that_were_not_measured(make_problem, make_table):
    problem = make_problem(average_weight_bits=8)
    table = make_table(problem.mixed, ROWS)
    allocation = allocate(FixedAllocator({"body": [2, 5], "head": 7}), problem, table)
    assert allocation.layers[1:] == (LayerBits("body", 2, 5), LayerBits("head", 7, 7))
    assert allocation.objective is None


def test_pins_win_over_a_pattern_that_means_other_layers_too(make_problem):
    problem = make_problem(average_weight_bits=4)
    assert FixedAllocator({"*": 4}).choose(problem, None)[0] == {"body": (4, 4), "head": (4, 4)}
    FixedAllocator({"stem": 8, "[bh]*": 4}).check(problem)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"body": 2}, "no pattern of body matches head; give them bits, or pin them"),
        ({"b*": 2, "haed": 2}, r"no layer is called 'haed' \(did you mean 'head'\?\)"),
        ({"*": 2, "body": 3}, r"'\*' and 'body' both match body; keep one"),
        ({"body": 2, "head": 2, "stem": 4}, "'stem' matches only pinned layers"),
        ({"*": 4}, r"exceed the budget \(budget\.average_weight_bits: 4 of 3\); raise it"),
    ],
)
def test_what_does_not_fit_shows_before_any_training(make_problem, bits, message):
    with pytest.raises(UserError, match=rf"allocator\.bits: .*{message}"):
        FixedAllocator(bits).check(make_problem(average_weight_bits=3))


@pytest.mark.parametrize("given", [1, 9, 2.0, True, "4", None, [], [2], [2, 9], [2, 3, 4]])
def test_bits_of_another_kind(given):
    with pytest.raises(ValueError, match=r"bits\.fc must be 2 … 8, or \[weights, activations\]"):
        FixedAllocator({"fc": given})


@pytest.mark.parametrize("bits", [None, 4, {}, ["fc"]])
def test_no_map(bits):
    with pytest.raises(ValueError, match="bits must map layer names to bits"):
        FixedAllocator(bits)
