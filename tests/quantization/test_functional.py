import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from adq_train.quantization.functional import (
    CodebookSTE,
    GeneralizedSTE,
    StraightThrough,
    assign,
    at_least_float32,
    best_clip,
    best_codebook_scale,
    cell_statistics,
    interval_edges,
    lloyd_max,
    midpoints,
    positive,
    quantiles,
    round_ste,
    scale_gradient,
    sums_by_index,
)

SEEDS = st.integers(0, 2**31)
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


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    st.lists(st.floats(0, 1), min_size=1, max_size=10),
)
def test_quantiles_are_those_of_torch(values, fractions):
    values = torch.tensor(values, dtype=torch.float64)
    fractions = torch.tensor(fractions, dtype=torch.float64)
    torch.testing.assert_close(
        quantiles(values.sort().values, fractions), torch.quantile(values, fractions)
    )


def test_quantiles_of_more_values_than_float32_can_count():
    count = 2**24 + 4
    ordered = torch.arange(count, dtype=torch.float64)
    positions = torch.tensor([1.0, count / 2, count - 2], dtype=torch.float64)
    torch.testing.assert_close(
        quantiles(ordered, positions / (count - 1)), positions, rtol=0, atol=1e-6
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(QUARTERS, st.integers(0, 5)), min_size=1, max_size=50))
def test_cell_statistics_count_and_sum(pairs):
    expected_counts, expected_sums = [0.0] * 7, [0.0] * 7
    for value, index in pairs:
        expected_counts[index] += 1
        expected_sums[index] += value
    values, indices = (torch.tensor(x) for x in zip(*pairs, strict=True))
    counts, sums = cell_statistics(values, indices, 7)
    assert counts.tolist() == expected_counts
    assert sums.tolist() == expected_sums


@pytest.mark.parametrize("num_levels", [2, 5, 9])
def test_lloyd_max_is_k_means_in_one_dimension(num_levels):
    for seed in range(5):
        values = np.random.default_rng(seed).normal(size=200)
        start = np.quantile(values, (np.arange(num_levels) + 0.5) / num_levels)
        reference = KMeans(num_levels, init=start[:, None], n_init=1, max_iter=1000, tol=0)
        expected = np.sort(reference.fit(values[:, None]).cluster_centers_[:, 0])
        free = torch.zeros(num_levels, dtype=torch.bool)
        levels = lloyd_max(torch.from_numpy(values), torch.from_numpy(start), free)
        np.testing.assert_allclose(levels, expected, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 200), st.integers(1, 6), st.integers(1, 6))
def test_lloyd_max_ends_where_each_level_is_the_mean_of_its_cell(seed, count, below, above):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    sides = torch.rand(below + above, generator=generator, dtype=torch.float64).sort().values
    start = torch.cat([sides[:below] - 1.01, torch.zeros(1), sides[below:] + 0.01])
    pinned = torch.arange(len(start)) == below

    levels = lloyd_max(values, start, pinned)

    assert levels[below] == 0
    assert (levels.diff() >= 0).all()
    nearest = (values[:, None] - levels).abs().argmin(1)
    for k in range(len(levels)):
        cell = values[nearest == k]
        if len(cell) and not pinned[k]:
            torch.testing.assert_close(levels[k], cell.mean())


def test_lloyd_max_gives_ties_to_the_lower_level_as_assignment_does():
    values, start = torch.tensor([0.0, 1.0, 2.0, 2.0]), torch.tensor([0.0, 2.0])
    assert lloyd_max(values, start, torch.zeros(2, dtype=torch.bool)).tolist() == [0.5, 2.0]


def test_lloyd_max_stops_at_its_bound():
    values, start = torch.tensor([0.0, 1.0, 10.0]), torch.tensor([0.0, 1.0])
    free = torch.zeros(2, dtype=torch.bool)
    # The first iteration gives the cells {0} and {1, 10}, the second {0, 1} and {10}.
    assert lloyd_max(values, start, free, max_iterations=1).tolist() == [0.0, 5.5]
    assert lloyd_max(values, start, free).tolist() == [0.5, 10.0]


@pytest.mark.parametrize("clip", [False, True])
def test_codebook_ste_passes_the_gradient_through(clip):
    codebook = torch.tensor([-1.0, 0.0, 1.0])
    weight = torch.tensor([[-1.5, -1.0, -0.6], [0.4, 1.0, 1.25]], requires_grad=True)
    incoming = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    quantized = CodebookSTE.apply(weight, codebook, clip)
    quantized.backward(incoming)

    assert quantized.tolist() == [[-1.0, -1.0, -1.0], [0.0, 1.0, 1.0]]
    inside = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]) if clip else torch.ones(2, 3)
    assert torch.equal(weight.grad, incoming * inside)


def surrogate(x, start, widths, levels):
    """What GeneralizedSTE says its backward pass differentiates."""
    left = start + torch.cat([widths.new_zeros(1), widths.cumsum(0)[:-1]])
    ramps = ((x[..., None] - left) / widths).clamp(0, 1)
    return levels[0] + (levels.diff() * ramps).sum(-1)


def code_by_counting(x, start, widths):
    """The number of thresholds below one value."""
    count, left = 0, start
    for width in widths:
        count += x > left + width / 2
        left += width
    return count


def codes_by_counting(x, start, widths):
    return torch.tensor([code_by_counting(v, start.item(), widths.tolist()) for v in x.tolist()])


def random_case(seed, bits, size):
    """Values inside and outside the range of 2^bits - 1 uneven intervals, and a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    widths = 0.1 + draw(2**bits - 1)
    start, levels = draw(()) * 4 - 3, (0.1 + draw(2**bits)).cumsum(0) - 2
    x = start + widths.sum() * (draw(size) * 1.4 - 0.2)
    return [x, start, widths, levels], draw(size) - 0.5


def gradients(function, inputs, incoming):
    leaves = [p.clone().requires_grad_() for p in inputs]
    return torch.autograd.grad(function(*leaves), leaves, incoming)


CASES = (SEEDS, st.integers(1, 8), st.integers(1, 60))


@settings(deadline=None, max_examples=40)
@given(*CASES)
def test_generalized_ste_takes_the_level_of_the_thresholds_below(seed, bits, size):
    inputs, _ = random_case(seed, bits, size)
    expected = inputs[3][codes_by_counting(*inputs[:3])]
    assert torch.equal(GeneralizedSTE.apply(*inputs), expected)


@settings(deadline=None, max_examples=40)
@given(*CASES)
def test_generalized_ste_differentiates_the_piecewise_linear_function(seed, bits, size):
    inputs, incoming = random_case(seed, bits, size)
    got = gradients(GeneralizedSTE.apply, inputs, incoming)
    expected = gradients(surrogate, inputs, incoming)
    for name, a, b in zip(("x", "start", "widths"), got, expected, strict=False):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@settings(deadline=None, max_examples=40)
@given(*CASES)
def test_generalized_ste_has_the_exact_gradient_of_the_levels(seed, bits, size):
    inputs, incoming = random_case(seed, bits, size)
    got = gradients(GeneralizedSTE.apply, inputs, incoming)[3]
    codes = codes_by_counting(*inputs[:3])
    expected = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, codes, incoming)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_generalized_ste_agrees_with_finite_differences(bits):
    (x, start, widths, levels), _ = random_case(bits, bits, 200)
    distances = (x[:, None] - interval_edges(start, widths)).abs().amin(1)
    x = x[distances > 1e-3]  # no kink within reach of a difference
    incoming = torch.randn(len(x), dtype=torch.float64)
    inputs = [x, start, widths, levels]

    def difference(position, offset):
        def loss(sign):
            moved = list(inputs)
            moved[position] = inputs[position] + sign * offset
            return (surrogate(*moved) * incoming).sum()

        return (loss(1) - loss(-1)) / (2 * offset.sum())

    grads = gradients(GeneralizedSTE.apply, inputs, incoming)
    for position, grad in enumerate(grads[:3]):
        units = 1e-6 * torch.eye(grad.numel(), dtype=torch.float64)
        expected = torch.stack([difference(position, u.view(grad.shape)) for u in units])
        torch.testing.assert_close(grad.flatten(), expected, rtol=1e-5, atol=1e-6)


def test_generalized_ste_at_thresholds_and_edges():
    start, levels = torch.tensor(0.0), torch.tensor([0.0, 2.0, 3.0, 7.0])
    widths = torch.tensor([1.0, 2.0, 4.0])  # thresholds 0.5, 2, 5; edges 0, 1, 3, 7
    at = torch.tensor([0.5, 2.0, 5.0])
    above = torch.nextafter(at, torch.tensor(9.0))
    assert GeneralizedSTE.apply(at, start, widths, levels).tolist() == [0, 2, 3]
    assert GeneralizedSTE.apply(above, start, widths, levels).tolist() == [2, 3, 7]

    edges = torch.tensor([0.0, 1.0, 3.0, 7.0])
    x = torch.cat([edges, torch.nextafter(edges, torch.tensor(9.0))]).requires_grad_()
    GeneralizedSTE.apply(x, start, widths, levels).sum().backward()
    # An interval holds its right edge, not its left one.
    assert x.grad.tolist() == [0, 2, 0.5, 1, 2, 0.5, 1, 0]


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_generalized_ste_at_extreme_scales(factor):
    inputs, incoming = random_case(3, 3, 50)
    inputs = [p * factor for p in inputs]
    expected = gradients(surrogate, inputs, incoming)
    got = gradients(GeneralizedSTE.apply, [p.float() for p in inputs], incoming.float())
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_generalized_ste_keeps_the_shape():
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = GeneralizedSTE.apply(x, torch.tensor(-1.0), torch.ones(3), torch.arange(4.0))
    y.sum().backward()
    assert y.shape == x.grad.shape == (2, 3, 4)


def test_interval_edges():
    edges = interval_edges(torch.tensor(-1.0), torch.tensor([0.5, 2.0]))
    assert edges.tolist() == [-1.0, -0.5, 1.5]


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


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(0, 8), st.integers(1, 8), st.sampled_from([1e-30, 1.0, 1e30]))
def test_best_clip_is_the_best_of_its_candidates(seed, low, high, factor):
    values = np.random.default_rng(seed).normal(size=100)
    if low == 0:
        values = abs(values)

    def error(step):
        return np.square(np.clip(np.round(values / step), -low, high) * step - values).mean()

    reach = max(values.max() / high, -values.min() / max(low, 1))
    best = min(error(reach * k / 100) for k in range(1, 101))
    step = float(best_clip(torch.tensor(values * factor, dtype=torch.float32), low, high)) / factor
    assert error(step) <= best * (1 + 1e-4)


def test_best_clip_of_values_on_a_grid_and_of_zeros():
    assert best_clip(torch.arange(-4.0, 4.0) / 2, 4, 3) == 0.5
    assert best_clip(torch.zeros(5), 3, 4) == 0.25


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


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 6), st.booleans(), st.sampled_from([1e-30, 1.0, 1e30]))
def test_best_codebook_scale_is_the_best_of_its_candidates(seed, count, signed, factor):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=100)
    levels = np.sort(rng.uniform(0.1, 2, size=count))
    if signed:
        levels = np.sort(np.append(levels, -rng.uniform(0.1, 2)))
    else:
        values = abs(values)

    def error(scale):
        return np.square(np.abs(values[:, None] - levels * scale).min(1)).mean()

    reach = values.max() / levels[-1]
    if signed:
        reach = max(reach, values.min() / levels[0])
    best = min(error(reach * k / 100) for k in range(1, 101))
    scale = best_codebook_scale(
        torch.tensor(values * factor, dtype=torch.float32),
        torch.tensor(levels, dtype=torch.float32),
    )
    assert error(float(scale) / factor) <= best * (1 + 1e-4)


def test_best_codebook_scale_of_zeros():
    assert best_codebook_scale(torch.zeros(5), torch.tensor([-1.0, 0.0, 1.0])) == 1


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
