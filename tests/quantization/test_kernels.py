"""The fast path gives what the plain one gives: values exactly, gradients within rounding."""

import contextlib
import math
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adq_train.quantization import kernels
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.fitting import order_statistics
from adq_train.quantization.functional import midpoints
from adq_train.quantization.steps import (
    GeneralizedSTE,
    interval_edges,
    interval_sums,
    interval_sums_by_mask,
    staircase,
    step_gradients,
)

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler here")


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """As on a machine without a compiler."""
    with mock.patch.object(kernels, "library", return_value=None):
        yield


def shaped(numbers: torch.Generator, layout: str, size: int) -> Tensor:
    """Values about the borders, in one of the ways that tensors lie in memory."""
    x = torch.randn(2, size, 3, 5, generator=numbers)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": x[:, :, ::2].transpose(1, 3),
        "flat": x.flatten()[: 7 * size + 1],
    }[layout]


cases = {
    "seed": st.integers(0, 2**32),
    "bits": st.integers(2, 8),
    "layout": st.sampled_from(["contiguous", "channels_last", "strided", "flat"]),
    "size": st.integers(1, 900),
}


@settings(deadline=None, max_examples=80)
@given(**cases, spread=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_staircase_is_equal_bit_for_bit(seed, bits, layout, size, spread):
    numbers = torch.Generator().manual_seed(seed)
    x = shaped(numbers, layout, size) * spread
    borders = torch.randn(2**bits - 1, generator=numbers).sort().values * spread
    values = torch.randn(2**bits, generator=numbers)
    x[0] = borders[-1]  # values that are a border themselves
    fast = staircase(x, borders, values)
    with plain():
        slow = staircase(x, borders, values)
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)


@pytest.mark.parametrize("count", [3, 7, 15, 16, 255])
def test_staircase_of_odd_values_and_borders(count):
    borders = torch.linspace(-1, 1, count)
    x = torch.cat([borders, torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])])
    values = torch.arange(count + 1.0)
    for row in (borders, torch.zeros(count), borders.clamp(-0.5, 0.5), borders * math.inf):
        row = row.nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)
        fast = staircase(x, row, values)
        with plain():
            assert torch.equal(fast, staircase(x, row, values))


@settings(deadline=None, max_examples=80)
@given(**cases)
def test_the_gradients_agree_within_rounding(seed, bits, layout, size):
    numbers = torch.Generator().manual_seed(seed)
    x, grad = (shaped(numbers, layout, size) for _ in range(2))
    start, levels = torch.tensor(-1.5), 0.4 * torch.arange(2.0**bits)
    widths = torch.rand(2**bits - 1, generator=numbers) * 6 / 2**bits + 1e-3

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        inputs = [v.clone().to(dtype).requires_grad_() for v in (x, start, widths, levels)]
        y = GeneralizedSTE.apply(*inputs)
        return list(torch.autograd.grad(y, inputs, grad.to(dtype)))

    # The same float32 edges on both sides: a value between two roundings of an edge may differ.
    fast = gradients(torch.float32)
    with plain():
        slow = gradients(torch.float32)
    torch.testing.assert_close(fast[0], slow[0], rtol=0, atol=0)
    # Sums of n terms, each off by half a unit in the last place of the running sum.
    edges = interval_edges(start, widths)
    inverse = 0.4 / float(widths.min())
    bound = 1e-6 * float(grad.abs().sum()) * max(1.0, inverse) * max(1.0, inverse)
    for got, expected in zip(fast[1:], slow[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=bound * float(edges.abs().max()))


@settings(deadline=None, max_examples=40)
@given(**cases, compiled=st.booleans())
def test_half_precision_is_float32_rounded(seed, bits, layout, size, compiled):
    numbers = torch.Generator().manual_seed(seed)
    x, grad = (shaped(numbers, layout, size).bfloat16() for _ in range(2))
    start, levels = torch.tensor(-1.5), torch.randn(2**bits, generator=numbers).sort().values
    widths = torch.rand(2**bits - 1, generator=numbers) * 6 / 2**bits + 1e-3

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        inputs = [v.clone().requires_grad_() for v in (x.to(dtype), start, widths, levels)]
        y = GeneralizedSTE.apply(*inputs)
        assert y.dtype == dtype
        return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(dtype))]

    with contextlib.nullcontext() if compiled else plain():
        half, full = gradients(torch.bfloat16), gradients(torch.float32)
    for got, expected in zip(half[:2], full[:2], strict=True):
        assert torch.equal(got, expected.bfloat16())
    for got, expected in zip(half[2:], full[2:], strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("values", [[math.inf, -math.inf], [math.nan, 1.0], [3.4e38, -3.4e38]])
def test_odd_levels_round_to_bfloat16_as_in_pytorch(values):
    x, borders = torch.tensor([-1.0, 0.0, 1.0, math.nan]).bfloat16(), torch.tensor([0.0])
    rounded = torch.tensor(values)[(~(x <= 0)).long()].bfloat16()
    fast = staircase(x, borders, torch.tensor(values))
    torch.testing.assert_close(fast, rounded, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [3, 15, 255])
def test_the_code_of_nan_is_the_last(count):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    edges, levels = torch.linspace(-1, 1, count + 1), torch.arange(count + 1.0)
    codes = torch.tensor([count, count, 0, int((midpoints(edges) < 0).sum())])
    for context in (contextlib.nullcontext(), plain()):
        with context:
            tables = edges, midpoints(edges), edges.diff(), levels
            of_levels = step_gradients(x, *tables, torch.ones(4))[3]
        assert torch.equal(of_levels, torch.bincount(codes, minlength=count + 1).float())


@pytest.mark.parametrize("form", [interval_sums, interval_sums_by_mask])
@pytest.mark.parametrize("count", [3, 7, 15])
def test_every_plain_form_of_the_sums_is_the_definition(count, form):
    numbers = torch.Generator().manual_seed(count)
    x = torch.randn(1000, generator=numbers, dtype=torch.float64)
    grad = torch.randn(1000, generator=numbers, dtype=torch.float64)
    edges = torch.linspace(-1, 1, count + 1, dtype=torch.float64)
    thresholds, slopes = midpoints(edges), torch.arange(count + 2.0, dtype=torch.float64)
    grad_x, sums = form(x, grad, edges, thresholds, slopes)
    for k, edge in enumerate(edges):
        torch.testing.assert_close(sums[k], grad[x > edge].sum())
        torch.testing.assert_close(sums[count + 1 + k], (grad * x)[x > edge].sum())
    for k, threshold in enumerate(thresholds):
        torch.testing.assert_close(sums[2 * count + 2 + k], grad[x > threshold].sum())
    torch.testing.assert_close(sums[-1], grad.sum())
    torch.testing.assert_close(grad_x, grad * slopes[(x[:, None] > edges).sum(1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9, 15, 16, 100, 255])
def test_any_number_of_intervals_gives_the_plain_gradients(count, dtype):
    numbers = torch.Generator().manual_seed(count)
    x, grad = (torch.randn(1003, generator=numbers).to(dtype) for _ in range(2))
    edges = torch.linspace(-2, 2, count + 1)
    levels = torch.randn(count + 1, generator=numbers).sort().values
    tables = edges, midpoints(edges), edges.diff(), levels
    fast = step_gradients(x, *tables, grad)
    with plain():
        slow = step_gradients(x, *tables, grad)
    assert torch.equal(fast[0], slow[0])
    for got, expected in zip(fast[1:], slow[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3 * count)
    without = step_gradients(x, *tables, grad, of_input=False)
    assert all(torch.equal(a, b) for a, b in zip(without[1:], fast[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_that_of_the_kernels(dtype):
    edges, levels = torch.linspace(-1, 1, 256), torch.arange(256.0)
    given = torch.randn(100), edges, midpoints(edges), edges.diff(), levels, torch.ones(100)
    ranks = torch.tensor([5, 50])
    values = torch.randn(3000)
    expected = [*step_gradients(*given), order_statistics(values, ranks)]
    torch.set_default_dtype(dtype)
    try:
        found = [*step_gradients(*given), order_statistics(values, ranks)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 255])
def test_the_number_of_threads_changes_nothing(count, dtype):
    numbers = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(100_003, generator=numbers).to(dtype) for _ in range(2))
    edges, levels = torch.linspace(-1, 1, count + 1), torch.arange(count + 1.0)
    tables = edges, midpoints(edges), edges.diff(), levels
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(step_gradients(x, *tables, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_of_another_layout_and_type_are_taken_in_order():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 3, 4, 5)
    edges, levels = torch.linspace(-1, 1, 4), torch.tensor([0.0, 1, 3, 6])
    widths = edges.diff()
    slopes = torch.cat([torch.zeros(1), levels.diff() / widths, torch.zeros(1)])
    fast = step_gradients(x, edges, midpoints(edges), widths, levels, grad.bfloat16())
    expected = grad.bfloat16().float() * slopes[torch.bucketize(x.contiguous(), edges)]
    assert torch.equal(fast[0], expected)
    assert fast[0].stride() == x.stride()


def test_what_the_compiler_is_told_of_the_operators():
    x, row = torch.randn(2, 3, 4, 5), torch.linspace(-1, 1, 4)
    values = torch.arange(5.0)
    last = x.contiguous(memory_format=torch.channels_last)
    for y in (x, last, x[:, :, ::2]):
        torch.library.opcheck(torch.ops.adq_train.staircase.default, (y, row, values))
    for y, wanted in ((x, True), (last, True), (x[:, :, ::2], True), (x, False)):
        tables = row, midpoints(row), row.diff(), row
        given = y, *tables, torch.randn_like(y), wanted
        torch.library.opcheck(torch.ops.adq_train.step_gradients.default, given)
    for dtype in (torch.float64, torch.bfloat16):
        given = x, *(t.to(dtype) for t in tables), torch.randn_like(x), True
        torch.library.opcheck(torch.ops.adq_train.step_gradients.default, given)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_compiled_network_takes_the_same_path(bits):
    x = torch.randn(2, 3, 8, 8)
    widths = torch.rand(2**bits - 1) * 6 / 2**bits + 1e-3
    inputs = torch.tensor(-1.5), widths, 0.4 * torch.arange(2.0**bits)

    def outputs(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in (x, *inputs)]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    compiled = outputs(torch.compile(GeneralizedSTE.apply, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, outputs(GeneralizedSTE.apply), strict=True):
        torch.testing.assert_close(got, expected)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(2**11 + 1, 20_000),
    kind=st.sampled_from(["normal", "few values", "one sign", "all bits", "sorted"]),
    data=st.data(),
)
def test_order_statistics_are_those_of_the_sorted_values(seed, size, kind, data):
    numbers = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=numbers)
    if kind == "few values":
        values = (values * 2).round() / 8
    elif kind == "one sign":
        values = -values.abs() * 1e-30
    elif kind == "all bits":
        words = torch.randint(-(2**31), 2**31, (size,), generator=numbers)
        values = words.to(torch.int32).view(torch.float32).nan_to_num()
    elif kind == "sorted":
        values = values.sort(descending=True).values
    ranks = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=32)))
    assert torch.equal(order_statistics(values, ranks), values.sort().values[ranks])


def test_a_codebook_follows_its_weights_alike_on_both_paths():
    weight = torch.randn(32, 16, 3, 3)
    fast, slow = AdqWeightQuantizer(3), AdqWeightQuantizer(3)
    fast.calibrate(weight)
    with plain():
        slow.calibrate(weight)
    for _ in range(1, 4):
        weight = weight * 1.01 + 0.01
        fast.adapt(weight)
        with plain():
            slow.adapt(weight)
    assert torch.equal(fast.codebook, slow.codebook)
    with plain():
        expected = slow(weight)
    assert torch.equal(fast(weight), expected)


def test_tensors_that_the_kernels_do_not_take():
    assert kernels.usable(torch.zeros(3))
    assert not kernels.usable(torch.zeros(0))
    assert not kernels.usable(torch.zeros(3, dtype=torch.float64))
    assert not kernels.usable(torch.zeros(3, device="meta"))
