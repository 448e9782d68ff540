"""Against closed forms of Student's t, and Holm's rule written out."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from adq_train.reporting.statistics import compare, holm, judge, summarize

accuracies = st.floats(50, 100).map(lambda x: round(x, 3))


def p_of_t_with_2_degrees(t):
    """Two-sided p; the distribution has the closed form (1 + t / √(2 + t²)) / 2."""
    return 1 - abs(t) / math.sqrt(2 + t * t)


def test_the_mean_and_the_sample_standard_deviation():
    assert summarize([]) is None
    assert summarize([3.0]) == summarize((3.0,))
    assert summarize([3.0]).std is None
    found = summarize([1.0, 2.0, 6.0])
    assert (found.n, found.mean) == (3, 3.0)
    assert found.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))


@given(st.lists(st.tuples(accuracies, accuracies), min_size=3, max_size=3))
def test_three_common_seeds_are_paired(pairs):
    row, reference = ({seed: pair[i] for seed, pair in enumerate(pairs)} for i in (0, 1))
    gaps = [a - b for a, b in pairs]
    found = compare(row, reference)
    assert found.mean == pytest.approx(statistics.fmean(gaps))
    assert found.n == (3,)
    if max(gaps) - min(gaps) < 1e-9:
        assert found.p_value is None
        return
    t = statistics.fmean(gaps) / (statistics.stdev(gaps) / math.sqrt(3))
    assert found.test == "paired t-test"
    assert found.p_value == pytest.approx(p_of_t_with_2_degrees(t), abs=1e-9)


def test_only_the_common_seeds_are_paired():
    found = compare({0: 91.0, 1: 92.0, 2: 94.0, 7: 10.0}, {0: 90.0, 1: 90.0, 2: 90.0, 8: 99.0})
    assert (found.test, found.n) == ("paired t-test", (3,))
    assert found.mean == pytest.approx(7 / 3)


def test_other_seeds_get_welch_s_test():
    """By hand: t = 2 / √(1/3 + 4/3), and Welch's formula for the degrees of freedom."""
    found = compare({0: 91.0, 1: 92.0, 2: 93.0}, {3: 88.0, 4: 90.0, 5: 92.0})
    a, b = 1 / 3, 4 / 3
    degrees = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
    expected = 2 * student.sf(2 / math.sqrt(a + b), degrees)
    assert (found.test, found.n, found.mean) == ("Welch's t-test", (3, 3), 2.0)
    assert found.p_value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("row", "reference", "n"),
    [({0: 9.0, 1: 8.0}, {0: 1.0, 1: 0.0}, (2,)), ({0: 9.0}, {1: 1.0, 2: 2.0, 3: 3.0}, (1, 3))],
)
def test_fewer_than_three_seeds_prove_nothing(row, reference, n):
    found = compare(row, reference)
    assert (found.verdict, found.test, found.p_value, found.n) == ("too few seeds", None, None, n)


def test_few_seeds_are_compared_over_those_that_both_rows_have():
    """Otherwise another choice of seeds would pass for a difference of methods."""
    found = compare({0: 87.3}, {0: 87.2, 1: 90.0})
    assert (found.mean, found.n) == (pytest.approx(0.1), (1,))


def test_differences_without_spread_are_not_tested():
    row = {0: 90.1, 1: 90.2, 2: 90.3}
    assert compare(row, row).verdict == "the same in every seed"
    higher = {seed: value + 0.22 for seed, value in row.items()}
    assert compare(higher, row).verdict == "no spread to test against"
    flat, other = dict.fromkeys(range(3), 90.0), dict.fromkeys(range(3, 6), 91.0)
    assert compare(flat, other).verdict == "no spread to test against"


def test_nothing_to_compare():
    assert compare({}, {0: 1.0}) is None
    assert compare({0: 1.0}, {}) is None


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_as_its_stepwise_rule_does(p_values):
    """Step down: reject the smallest p while p ≤ level / (m − rank); stop at the first failure."""
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if (len(p_values) - rank) * p_values[index] >= 0.05:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p < 0.05} == rejected


def test_a_gain_needs_its_corrected_p_below_the_level():
    def row(*gaps):
        return compare({i: 90 + g for i, g in enumerate(gaps)}, dict.fromkeys(range(3), 90.0))

    up, down = row(1.0, 1.01, 1.02), row(-1.0, -1.01, -1.02)
    unclear, few = row(1.0, -1.0, 0.1), compare({0: 99.0}, {0: 1.0})
    judged = judge([None, up, down, unclear, few])
    assert [x and x.verdict for x in judged] == [None, "gain", "loss", "not shown", "too few seeds"]
    assert judged[1].p_holm == pytest.approx(3 * up.p_value)
    # p = 0.0377 alone; two rows together need 0.025.
    borderline = row(1.0, 1.5, 0.9)
    assert 0.025 < borderline.p_value < 0.05
    assert judge([borderline])[0].verdict == "gain"
    assert judge([borderline, unclear])[0].verdict == "not shown"
