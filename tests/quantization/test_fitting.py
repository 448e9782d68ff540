import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from adq_train.quantization.fitting import (
    best_clip,
    best_codebook_scale,
    cell_statistics,
    lloyd_max,
    quantiles,
)

SEEDS = st.integers(0, 2**31)
# Quarters: sums and halves of them are exact, so ties are ties.
QUARTERS = st.integers(-200, 200).map(lambda i: i / 4)


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
