import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.quantization.fitting import (
    cell_statistics,
)
from adq_train.quantization.functional import (
    StraightThrough,
    assign,
    at_least_float32,
    midpoints,
    positive,
    round_ste,
    scale_gradient,
    sums_by_index,
)

# Quarters: sums and halves of them are exact, so ties are ties.
QUARTERS = st.integers(-200, 200).map(lambda i: i / 4)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(QUARTERS, min_size=1, max_size=40),
    st.lists(st.integers(-40, 40), min_size=1, max_size=16, unique=True),
)
def test_assign_finds_the_nearest_level_and_the_lower_of_two(values, levels):
    levels = sorted(levels)
    distances = np.abs(np.subtract.outer(values, levels))
    indices = assign(torch.tensor(values), torch.tensor(levels, dtype=torch.float32))
    assert indices.tolist() == distances.argmin(1).tolist()


def test_assign_keeps_the_shape_and_takes_equal_levels():
    codebook = torch.tensor([-1.0, 0.0, 0.0, 0.0, 2.0])
    values = torch.tensor([[-3.0, -0.25, 0.0], [0.25, 1.5, 9.0]])
    assert torch.equal(
        codebook[assign(values, codebook)], torch.tensor([[-1.0, 0.0, 0.0], [0.0, 2.0, 2.0]])
    )


def test_midpoints():
    assert midpoints(torch.tensor([-2.0, 0.0, 1.0])).tolist() == [-1.0, 0.5]


def test_round_ste_rounds_and_lets_the_gradient_pass():
    x = torch.tensor([-1.7, -0.5, 0.3, 126.7], requires_grad=True)
    y = round_ste(x)
    y.backward(torch.arange(4.0))
    assert torch.equal(y, x.round())
    assert torch.equal(x.grad, torch.arange(4.0))


@pytest.mark.parametrize("factor", [1e-3, 0.1, 0.3])
def test_scale_gradient_leaves_the_value_bitwise(factor):
    x = torch.randn(1000, requires_grad=True)
    y = scale_gradient(x, factor)
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.full((1000,), factor))


def test_straight_through_gives_the_value_bitwise_and_the_gradient_to_the_other():
    x = torch.randn(100, requires_grad=True)
    value = 1e-8 * torch.randn(100, requires_grad=True)
    y = StraightThrough.apply(x, value)
    y.backward(torch.arange(100.0))
    assert torch.equal(y, value)
    assert torch.equal(x.grad, torch.arange(100.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_at_least_float32(dtype):
    x = torch.tensor([0.5, -2.0], dtype=dtype)
    lifted = at_least_float32(x)
    assert lifted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lifted.tolist() == [0.5, -2.0]


def test_positive():
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    y = positive(x)
    y.sum().backward()
    assert y.tolist() == [2.0, torch.finfo(torch.float32).tiny, 3.0]
    assert x.grad.tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_by_index_are_those_of_bincount_bit_for_bit(dtype):
    for size, count in ((1, 2), (1000, 3), (100_000, 512)):
        values, indices = torch.randn(size, dtype=dtype), torch.randint(count, (size,))
        expected = torch.bincount(indices, weights=values, minlength=count)
        for kind in (torch.int32, torch.int64):
            assert torch.equal(sums_by_index(values, indices.to(kind), count), expected)
        counts, sums = cell_statistics(values, indices, count)
        assert torch.equal(counts, torch.bincount(indices, minlength=count).to(dtype))
        assert torch.equal(sums, expected)
