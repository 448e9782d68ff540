import pytest

from adq_train.allocation.budget import (
    Bits,
    Budget,
    Problem,
    budget_from,
    figures,
    packed_bytes,
)
from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError


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
    assert weights.cost(body, Bits(3, 2)) == 300
    assert inputs.cost(body, Bits(3, 2)) == 128
    assert size.cost(body, Bits(3, 2)) == 38
    assert bops.cost(body, Bits(3, 2)) == 18_000
    # The averages leave the pinned stem out; size and operations count it.
    assert [
        weights.cost(stem, Bits(8, 8)),
        weights.cost(body, Bits(3, 3)),
        weights.cost(head, Bits(2, 2)),
    ] == [0, 300, 102]
    assert (weights.bound, weights.unit) == (3 * 151, 151)
    assert [
        inputs.cost(stem, Bits(8, 8)),
        inputs.cost(body, Bits(3, 3)),
        inputs.cost(head, Bits(2, 2)),
    ] == [0, 192, 34]
    assert (inputs.bound, inputs.unit) == (202, 81)  # 2.5 × 81 = 202.5
    assert [
        size.cost(stem, Bits(8, 8)),
        size.cost(body, Bits(3, 3)),
        size.cost(head, Bits(2, 2)),
    ] == [27, 38, 13]
    assert (size.bound, size.unit) == (100, 1)
    assert [
        bops.cost(stem, Bits(8, 8)),
        bops.cost(body, Bits(3, 3)),
        bops.cost(head, Bits(2, 2)),
    ] == [64000, 27000, 204]
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
    assert [problem.options(x) for x in problem.layers] == [
        (Bits(8, 8),), *[(Bits(2, 2), Bits(3, 3), Bits(4, 4))] * 2
    ]  # fmt: skip


def test_layers_may_have_candidates_of_their_own(make_problem):
    problem = make_problem(candidates_by_layer={"head": (4,)}, average_weight_bits=3)
    assert problem.widths(problem.mixed[1]) == (4,)
    # 100 weights at 2 bits and 51 at 4 bits
    with pytest.raises(UserError, match=f"the least is {404 / 151:.10g} and the most 4;"):
        make_problem(candidates_by_layer={"head": (4,)}, average_weight_bits=2).check()


def test_separate_bits_are_all_pairs_except_for_pinned_layers(make_problem):
    problem = make_problem(tied=False, candidates_by_layer={"head": (2, 4)})
    stem, body, head = (problem.options(x) for x in problem.layers)
    assert stem == (Bits(8, 8),)
    assert len(body) == 9
    assert head == (Bits(2, 2), Bits(2, 4), Bits(4, 2), Bits(4, 4))


def test_every_limit_out_of_reach_is_told(make_problem):
    with pytest.raises(UserError) as error:
        make_problem(average_weight_bits=1, model_size_bytes=1, bops=1e9).check()
    lines = str(error.value).splitlines()
    assert [x.split(":")[0] for x in lines] == [
        "budget.average_weight_bits", "budget.model_size_bytes"
    ]  # fmt: skip


def test_broken_limits_by_hand(make_problem):
    problem = make_problem(average_weight_bits=2.5, bops=1e9)
    bits = {"stem": Bits(8, 8), "body": Bits(4, 2), "head": Bits(2, 2)}
    assert problem.broken(bits) == [f"budget.average_weight_bits: {502 / 151:.10g} of 2.5"]
    assert problem.broken({**bits, "body": Bits(2, 4)}) == []


def test_shares_of_the_float_model():
    layers = (LayerInfo("a", 100, 3000, 64), LayerInfo("b", 11, 17, 5))
    shares = {
        "average_weight_bits": "0.1x",
        "average_activation_bits": "1x",
        "model_size_bytes": "0.3x",
        "bops": "0.01x",
    }
    budget = budget_from(shares, layers)
    assert budget == Budget(3.2, 32.0, 133.2, 3017 * 1024 / 100)
    assert budget_from({"bops": 7.5, "model_size_bytes": None}, layers) == Budget(bops=7.5)


@pytest.mark.parametrize(
    "text", ["", "x", "0.1", "0x", "-0.1x", "1.1x", ".1x", "1.x", "1e-1x", "nanx", "0.1X", "0.1x ",
             "٠.٣x"]
)  # fmt: skip
def test_another_text_is_no_share(text):
    with pytest.raises(ValueError, match=r"a share of the float model's such as 0\.1x"):
        budget_from({"bops": text}, [LayerInfo("a", 1, 10, 10)])


def test_figures_by_hand():
    layers = (LayerInfo("a", 9, 3000, 64), LayerInfo("b", 11, 17, 5))
    bits = {"a": Bits(8, 4), "b": Bits(3, 2)}
    found = figures(layers, bits, {"a": 8})
    assert found.average_weight_bits == 3
    assert found.average_weight_bits_all_layers == (72 + 33) / 20
    assert found.average_activation_bits == 2
    assert found.model_size_bytes == 9 + 5
    assert found.bops == 3000 * 32 + 17 * 6
