import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adq_train.deploy.integers import counted, integer_grid, moved, on_integers
from adq_train.deploy.layer_tables import Staircase

INFINITY = float("inf")
small = st.floats(-4, 4, width=32)


@given(st.lists(st.integers(-127, 127), min_size=2, max_size=16), st.floats(1e-6, 1e3))
def test_levels_on_a_grid_are_found_with_the_smallest_integers(integers, step):
    levels = torch.tensor(integers).double().mul(step).float()
    grid = integer_grid(levels)
    assert grid.error == 0
    torch.testing.assert_close(grid.levels(), levels, rtol=1e-5, atol=1e-6 * 127 * step)
    divisor = max(math.gcd(*integers), 1)
    assert int(grid.integers.abs().max()) == max(map(abs, integers)) // divisor


@given(st.lists(small, min_size=3, max_size=16))
def test_other_levels_move_by_at_most_a_254th_of_the_largest(values):
    levels = torch.tensor(values)
    grid = integer_grid(levels)
    largest = float(levels.abs().max())
    assert float((grid.levels() - levels).abs().max()) <= largest / 253.9 + 1e-9
    assert int(grid.integers.abs().max()) <= 255
    if grid.error:
        assert int(grid.integers.abs().max()) <= (127 if min(values) < 0 else 255)


def counts(found, x):
    """What a MultiThreshold node computes."""
    return found.first + (x[:, None] >= found.values).sum(1)


@given(st.lists(small, min_size=1, max_size=9), st.booleans(), st.booleans(), st.data())
def test_every_value_gets_the_integer_of_its_level(values, ends, behind_relu, data):
    thresholds = torch.tensor(sorted([*values, *([-INFINITY, INFINITY] if ends else [])]))
    integers = data.draw(st.lists(st.integers(0, 5), min_size=len(thresholds) + 1))
    levels = torch.tensor(integers[: len(thresholds) + 1]).cumsum(0).float() - 3
    stairs = Staircase(4, thresholds, levels * 0.37)
    found = counted(stairs, behind_relu)
    finite = thresholds[thresholds.isfinite()]
    up = torch.full_like(finite, INFINITY)
    x = torch.cat(
        [finite, torch.nextafter(finite, up), torch.nextafter(finite, -up), torch.randn(50), up * 0]
    )
    x = x[x.isfinite()]
    expected = stairs.levels[torch.bucketize(x.relu() if behind_relu else x, thresholds)]
    torch.testing.assert_close((counts(found, x) * found.step).float(), expected)
    assert found.values.isfinite().all()
    assert (found.values.diff() >= 0).all()
    assert not behind_relu or (found.values > 0).all()


def test_levels_that_move_are_told_and_others_are_not_touched(small):
    model = small[1]
    assert on_integers(model).layers["fc"].input.levels is model.layers["fc"].input.levels
    (line,) = moved(model.layers)
    assert "the weight levels of 8 layers (conv1, layer1.0.conv1, layer1.0.conv2, …)" in line
    assert moved(on_integers(model).layers) == ()
    before, after = model.layers["fc"].weight, on_integers(model).layers["fc"].weight
    change = (after.codebook - before.codebook).abs().max() / before.codebook.abs().max()
    assert 0 < float(change) < 1 / 253
    assert torch.equal(after.codes, before.codes)


def test_no_levels_but_zero():
    grid = integer_grid(torch.zeros(4))
    assert (grid.integers.tolist(), grid.step, grid.error) == ([0] * 4, 1.0, 0.0)


@pytest.mark.parametrize(
    ("levels", "integers"),
    [
        ([0.0, 0.5, 1.0, 1.5], [0, 1, 2, 3]),
        ([-0.75, -0.25, 0.25, 0.75], [-3, -1, 1, 3]),  # without a zero
        ([0.0, 0.25, 0.5, 1.0], [0, 1, 2, 4]),  # powers of two
    ],
)
def test_integers_of_the_usual_grids(levels, integers):
    assert integer_grid(torch.tensor(levels) / 3).integers.tolist() == integers
