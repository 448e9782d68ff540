from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adq_train.allocation import ilp
from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Budget, Problem
from adq_train.allocation.ilp import IlpAllocator
from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError

COSTS = {
    "average_weight_bits": lambda x, w, a: x.num_weights * w,
    "average_activation_bits": lambda x, w, a: x.num_inputs * a,
    "model_size_bytes": lambda x, w, a: (x.num_weights * w + 7) // 8,
    "bops": lambda x, w, a: x.macs * w * a,
}


def totals(problem, name):
    """What a budget sums over: (layer, options) pairs, and what the figure is divided by."""
    average = name.startswith("average")
    layers = problem.mixed if average else problem.layers
    size = {"average_weight_bits": "num_weights", "average_activation_bits": "num_inputs"}
    unit = sum(getattr(x, size[name]) for x in layers) if average else 1
    return layers, unit


def cost(problem, name, bits):
    layers, _ = totals(problem, name)
    return sum(COSTS[name](x, *bits[x.name]) for x in layers)


def best_objective(problem, values, bounds):
    """The smallest objective of all allocations within the bounds, one by one."""
    best = float("inf")
    pinned = {name: (b, b) for name, b in problem.pinned.items()}
    for choice in product(*(values[x.name].items() for x in problem.mixed)):
        chosen = {x.name: bits for x, (bits, _) in zip(problem.mixed, choice, strict=True)}
        bits = {**chosen, **pinned}
        if all(cost(problem, name, bits) <= bound for name, bound in bounds.items()):
            best = min(best, sum(value for _, value in choice))
    return best


def with_budget(layers, pinned, candidates, shares, **more):
    """A problem whose bounds lie at given shares of the way from the least to the most."""
    problem = Problem(layers, pinned, candidates, Budget(), **more)
    bounds, budget = {}, {}
    for name, share in shares.items():
        _, unit = totals(problem, name)
        ends = [
            cost(problem, name, {x.name: (pick(problem.widths(x)),) * 2 for x in layers})
            for pick in (min, max)
        ]
        bounds[name] = ends[0] + int(share * (ends[1] - ends[0]))
        budget[name] = bounds[name] / unit
    return Problem(layers, pinned, candidates, Budget(**budget), **more), bounds


def tied_values(layers, rows, candidates):
    """Ω by layer and pair of equal widths."""
    return {
        x.name: {(b, b): value for b, value in zip(candidates, row, strict=True)}
        for x, row in zip(layers, rows, strict=True)
    }


ROWS = [(9.0, 5.0, 0.0), (0.3, 0.2, 0.1)]  # of the two layers of make_problem that are not pinned
SIZES = st.integers(1, 1000)
SENSITIVITIES = st.floats(-10, 10) | st.floats(0, 1e-3) | st.integers(0, 2).map(float)


@st.composite
def problems(draw):
    count = draw(st.integers(1, 5))
    step = draw(st.sampled_from([1, 16, 1000]))  # sizes with a common divisor, too
    layers = tuple(
        LayerInfo(f"layer{i}", step * draw(SIZES), step * draw(SIZES), step * draw(SIZES))
        for i in range(count)
    )
    pinned = {"layer0": 8} if count > 1 and draw(st.booleans()) else {}
    candidates = draw(st.lists(st.integers(2, 8), min_size=1, max_size=3, unique=True))
    candidates = tuple(sorted(candidates))
    names = draw(st.lists(st.sampled_from(sorted(COSTS)), min_size=1, max_size=4, unique=True))
    problem, bounds = with_budget(
        layers, pinned, candidates, {name: draw(st.floats(0, 1)) for name in names}
    )
    row = st.lists(SENSITIVITIES, min_size=len(candidates), max_size=len(candidates))
    rows = [draw(row) for _ in problem.mixed]
    return problem, bounds, rows


def check_optimal(problem, bounds, values, table):
    best = best_objective(problem, values, bounds)
    assert best < float("inf")  # budgets that are in reach one by one are so together
    allocation = allocate(IlpAllocator(), problem, table)
    bits = {x.name: (x.weight_bits, x.activation_bits) for x in allocation.layers}
    scale = max(abs(x) for row in values.values() for x in row.values())
    assert allocation.objective == pytest.approx(best, rel=1e-9, abs=1e-9 * scale)
    for name, bound in bounds.items():
        assert cost(problem, name, bits) <= bound
    assert allocation.optimal is True
    assert all(bits[name] == (pinned, pinned) for name, pinned in problem.pinned.items())


@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_as_good_as_the_best_of_all_allocations(make_table, problem):
    problem, bounds, rows = problem
    assume(any(map(any, rows)))  # a table of zeros is refused
    values = tied_values(problem.mixed, rows, problem.candidates)
    check_optimal(problem, bounds, values, make_table(problem.mixed, rows, problem.candidates))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(10**7, 3 * 10**7), min_size=5, max_size=5),
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=5, max_size=5),
    st.floats(0, 1),
)
def test_large_layers_neither_break_the_limit_nor_lose_the_optimum(make_table, sizes, rows, share):
    assume(any(map(any, rows)))
    layers = tuple(LayerInfo(str(n), size, size, size) for n, size in enumerate(sizes))
    problem, bounds = with_budget(layers, {}, (2, 3, 4), {"average_weight_bits": share})
    check_optimal(problem, bounds, tied_values(layers, rows, (2, 3, 4)), make_table(layers, rows))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("num_budgets", [1, 2, 3])
def test_two_hundred_instances_with_candidates_of_their_own(make_table, num_budgets, tied):
    for seed in range(200 // 6 + 1):
        random = np.random.default_rng([seed, num_budgets, tied])
        layers = tuple(
            LayerInfo(str(n), *random.integers(1, 2000, 3).tolist())
            for n in range(random.integers(2, 5 if tied else 4))
        )
        widths = tuple(sorted(random.choice(range(2, 9), 4 if tied else 3, replace=False).tolist()))
        own = {"1": tuple(sorted(random.choice(widths, 2, replace=False).tolist()))}
        names = random.choice(sorted(COSTS), num_budgets, replace=False)
        shares = {name: random.uniform(0, 1) for name in names}
        pinned = {"0": 8} if random.random() < 0.3 else {}
        problem, bounds = with_budget(
            layers, pinned, widths, shares, candidates_by_layer=own, tied=tied
        )
        weights, inputs = random.exponential(size=(2, len(problem.mixed), len(widths)))
        table = make_table(problem.mixed, weights.tolist(), widths, inputs.tolist())
        values = {
            x.name: {
                (w, a): weights[n, widths.index(w)] + inputs[n, widths.index(a)]
                for w in own.get(x.name, widths)
                for a in own.get(x.name, widths)
                if w == a or not tied
            }
            for n, x in enumerate(problem.mixed)
        }
        check_optimal(problem, bounds, values, table)


@pytest.mark.parametrize(("limit", "bits"), [(1124.9, [3, 3]), (1125, [6, 3])])
def test_a_limit_between_multiples_of_the_common_divisor(make_table, limit, bits):
    layers = tuple(LayerInfo(name, 1000, 1, 1) for name in "ab")  # 250, 375 or 750 bytes each
    problem = Problem(layers, {}, (2, 3, 6), Budget(model_size_bytes=limit))
    table = make_table(layers, [(5, 3, 1.5), (5, 3, 2)], (2, 3, 6))
    allocation = allocate(IlpAllocator(), problem, table)
    assert [x.weight_bits for x in allocation.layers] == bits


@pytest.mark.parametrize(("limit", "bits"), [(90, [8, 4, 2]), (89, [8, 3, 3])])
def test_pinned_layers_use_up_their_share(make_problem, make_table, limit, bits):
    # 27 bytes of the stem, then 50 + 13 bytes at 4 and 2 bits, or 38 + 20 at 3 and 3.
    problem = make_problem(model_size_bytes=limit)
    allocation = allocate(IlpAllocator(), problem, make_table(problem.mixed, ROWS))
    assert [x.weight_bits for x in allocation.layers] == bits


def test_without_differences_any_allocation_within_the_budget_will_do(make_problem, make_table):
    problem = make_problem(average_weight_bits=2.5)
    allocation = allocate(IlpAllocator(), problem, make_table(problem.mixed, [(1, 1, 1)] * 2))
    assert allocation.objective == 2
    assert allocation.caveat == "which are within noise"
    assert allocation.average_weight_bits <= 2.5
    assert allocation.optimal


def test_a_budget_out_of_reach_tells_what_is_in_reach(make_problem, make_table):
    problem = make_problem(average_weight_bits=1.5)
    with pytest.raises(UserError, match=r"average_weight_bits: 1\.5 .*least is 2 .*most 4;"):
        allocate(IlpAllocator(), problem, make_table(problem.mixed, [(1, 1, 1)] * 2))


def answers_of_the_solver(monkeypatch, *answers):
    """Lets the solver be wrong: each answer changes one solution; the rest pass as they are."""
    milp, answers = ilp.milp, list(answers)

    def answer(*args, **kwargs):
        solution = milp(*args, **kwargs)
        solution.update(answers.pop(0) if len(answers) > 1 else answers[0])
        return solution

    monkeypatch.setattr(ilp, "milp", answer)


def test_an_allocation_found_in_time_but_not_proven(make_problem, make_table, monkeypatch):
    answers_of_the_solver(monkeypatch, {"status": 1})
    problem = make_problem(average_weight_bits=3)
    assert not allocate(IlpAllocator(), problem, make_table(problem.mixed, ROWS)).optimal


def test_no_allocation_found_in_time(make_problem, make_table, monkeypatch):
    answers_of_the_solver(monkeypatch, {"x": None, "message": "Time limit reached."})
    problem = make_problem(average_weight_bits=3)
    with pytest.raises(UserError, match=r"Time limit reached\..*time_limit_seconds"):
        allocate(IlpAllocator(), problem, make_table(problem.mixed, ROWS))


def test_a_broken_limit_is_tightened(make_problem, make_table, monkeypatch):
    four_each = np.array([0.0, 0, 1, 0, 0, 1])
    answers_of_the_solver(monkeypatch, {"x": four_each}, {})
    problem = make_problem(average_weight_bits=3)
    allocation = allocate(IlpAllocator(), problem, make_table(problem.mixed, ROWS))
    assert allocation.average_weight_bits <= 3
    assert not allocation.optimal


def test_a_limit_that_stays_broken(make_problem, make_table, monkeypatch):
    answers_of_the_solver(monkeypatch, {"x": np.array([0.0, 0, 1, 0, 0, 1]), "status": 0})
    problem = make_problem(average_weight_bits=3.9)
    with pytest.raises(UserError, match="cannot meet the budget exactly"):
        allocate(IlpAllocator(), problem, make_table(problem.mixed, ROWS))


def test_the_time_limit_reaches_the_solver(make_problem, make_table, monkeypatch):
    seen, milp = [], ilp.milp

    def spy(*args, **kwargs):
        seen.append(kwargs["options"]["time_limit"])
        return milp(*args, **kwargs)

    monkeypatch.setattr(ilp, "milp", spy)
    problem = make_problem(average_weight_bits=3)
    allocate(IlpAllocator(time_limit_seconds=7.0), problem, make_table(problem.mixed, ROWS))
    assert seen == [7.0]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_time_limit_out_of_range(seconds):
    with pytest.raises(ValueError, match="time_limit_seconds"):
        IlpAllocator(seconds)
