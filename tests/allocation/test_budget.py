import pytest

from adq_train.allocation.budget import Budget, Problem, allocate, packed_bytes, pinned_bits
from adq_train.artifacts import LayerBits, LayerInfo
from adq_train.errors import UserError


class Fixed:
    """An allocator that gives the bits it was told to give."""

    name = "fixed"

    def __init__(self, **bits):
        self.bits = bits

    def choose(self, problem, table):
        return self.bits, False


@pytest.mark.parametrize(
    ("num_weights", "bits", "expected"),
    [(8, 3, 3), (9, 3, 4), (1, 2, 1), (0, 4, 0), (10**7, 8, 10**7), (10**7 + 1, 3, 3_750_001)],
)
def test_packed_bytes_round_each_layer_up(num_weights, bits, expected):
    assert packed_bytes(num_weights, bits) == expected


def test_limits_are_those_that_are_set():
    assert Budget().limits() == {}
    assert Budget(average_weight_bits=3, bops=1e9).limits() == {
        "average_weight_bits": 3.0,
        "bops": 1e9,
    }


def test_costs_by_hand(make_problem):
    problem = make_problem(
        average_weight_bits=3, average_activation_bits=2.5, model_size_bytes=100, bops=1e5
    )
    stem, body, head = problem.layers
    weights, inputs, size, bops = problem.limits()
    # The averages leave the pinned stem out; size and operations count it.
    assert [weights.cost(stem, 8), weights.cost(body, 3), weights.cost(head, 2)] == [0, 300, 102]
    assert (weights.bound, weights.unit) == (3 * 151, 151)
    assert [inputs.cost(stem, 8), inputs.cost(body, 3), inputs.cost(head, 2)] == [0, 192, 34]
    assert (inputs.bound, inputs.unit) == (202, 81)  # 2.5 × 81 = 202.5
    assert [size.cost(stem, 8), size.cost(body, 3), size.cost(head, 2)] == [27, 38, 13]
    assert (size.bound, size.unit) == (100, 1)
    assert [bops.cost(stem, 8), bops.cost(body, 3), bops.cost(head, 2)] == [64000, 27000, 204]
    assert (bops.bound, bops.unit) == (100_000, 1)


@pytest.mark.parametrize(("average", "bound"), [(2.81, 281_000), (2.3, 230_000), (8 / 3, 266_666)])
def test_an_average_loses_nothing_to_its_binary_form(average, bound):
    problem = Problem((LayerInfo("a", 100_000, 1, 1),), {}, (2,), Budget(average))
    assert problem.limits()[0].bound == bound


def test_an_achieved_average_admits_itself():
    for num_weights in range(3, 200):
        for total in range(2 * num_weights, 4 * num_weights, 7):
            layer = LayerInfo("a", num_weights, 1, 1)
            problem = Problem((layer,), {}, (2,), Budget(total / num_weights))
            assert problem.limits()[0].bound == total


def test_an_absolute_limit_has_no_slack():
    problem = Problem((LayerInfo("a", 1, 10**14, 1),), {}, (2,), Budget(bops=4e14 - 1))
    assert problem.limits()[0].bound == 4 * 10**14 - 1
    with pytest.raises(UserError, match=r"budget\.bops"):
        problem.check()


@pytest.mark.parametrize(
    ("name", "enough", "too_little", "least", "most"),
    [
        ("average_weight_bits", 2, 1.99, "2 ", "4;"),
        ("average_activation_bits", 2, 1.5, "2 ", "4;"),
        # 27 + 25 + 13 and 27 + 50 + 26 bytes
        ("model_size_bytes", 65, 64, "65 ", "103;"),
        # 64,000 + (3,000 + 51) × 4 and × 16
        ("bops", 76_204, 76_203, "76204 ", "112816;"),
    ],
)
def test_a_budget_out_of_reach_tells_what_is_in_reach(
    make_problem, name, enough, too_little, least, most
):
    make_problem(**{name: enough}).check()
    with pytest.raises(UserError) as error:
        make_problem(**{name: too_little}).check()
    message = str(error.value)
    assert f"budget.{name}: {too_little}" in message
    assert f"the least is {least}" in message
    assert f"the most {most}" in message


def test_a_model_without_layers_to_choose_for_is_refused(make_problem):
    problem = make_problem(pinned={"stem": 8, "body": 8, "head": 8}, bops=1e9)
    with pytest.raises(UserError, match=r"bits\.first_last=null"):
        problem.check()


def test_options_and_mixed_layers(make_problem):
    problem = make_problem()
    assert [x.name for x in problem.mixed] == ["body", "head"]
    assert [problem.options(x) for x in problem.layers] == [(8,), (2, 3, 4), (2, 3, 4)]


def test_an_allocation_accounts_for_its_cost(make_problem, make_table):
    problem = make_problem(average_weight_bits=3, model_size_bytes=90)
    # The table may hold pinned layers too; they do not count.
    table = make_table(problem.layers, [(9, 9, 9), (1.5, 1.0, 0.5), (0.4, 0.2, 0.1)])
    allocation = allocate(Fixed(body=3, head=2), problem, table)
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
    assert (allocation.allocator, allocation.optimal) == ("fixed", False)


def test_an_allocator_that_breaks_a_limit_is_caught(make_problem, make_table):
    problem = make_problem(average_weight_bits=3)
    table = make_table(problem.mixed, [(1, 1, 1)] * 2)
    with pytest.raises(AssertionError, match="fixed broke the limit average_weight_bits"):
        allocate(Fixed(body=4, head=2), problem, table)


def test_allocate_refuses_a_budget_out_of_reach(make_problem, make_table):
    problem = make_problem(model_size_bytes=1)
    with pytest.raises(UserError, match=r"budget\.model_size_bytes"):
        allocate(Fixed(), problem, make_table(problem.mixed, [(1, 1, 1)] * 2))


LAYERS = tuple(LayerInfo(name, 10, 10, 10) for name in ("stem", "a.conv1", "a.conv2", "head"))


def test_the_ends_are_pinned_unless_told_otherwise():
    assert pinned_bits(LAYERS, 8, {}) == {"stem": 8, "head": 8}
    assert pinned_bits(LAYERS, None, {}) == {}


def test_layers_are_pinned_by_name_and_pattern_over_the_ends():
    assert pinned_bits(LAYERS, 8, {"a.*": 2, "head": 4}) == {
        "stem": 8, "a.conv1": 2, "a.conv2": 2, "head": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a.conv3": 2}, r"no layer is called 'a.conv3' \(did you mean 'a.conv2'\?\)"),
        ({"zzz*": 2}, r"no layer is called 'zzz\*'; the layers are stem, a.conv1, a.conv2, head"),
        ({"a.*": 2, "*.conv1": 3}, r"'a.\*' and '\*.conv1' both match a.conv1; keep one"),
    ],
)
def test_a_pin_that_matches_nothing_or_twice_is_an_error(given, message):
    with pytest.raises(UserError, match=message):
        pinned_bits(LAYERS, 8, given)
