import copy
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from adq_train.quantization.adq import (
    ADAPTATIONS,
    GRANULARITIES,
    INITIALIZATIONS,
    LEVEL_SETS,
    AdqWeightQuantizer,
    _side_quantiles,
    _with_zero,
    random_codebook,
    revive_dead_level,
    side_sizes,
    uniform_codebook,
)

BITS = range(2, 9)


PAPER = {"initialization": "quantile", "level_set": "symmetric", "adaptation": "centroid"}


def calibrated(weight, bit_width=3, **options):
    options = PAPER | options
    quantizer = AdqWeightQuantizer(bit_width, **options)
    quantizer.calibrate(weight)
    return quantizer


def quantiles_of_sides(weights, below, above, zero):
    """The paper's initialisation, by numpy."""
    sides = [
        np.quantile(side, (np.arange(count) + 0.5) / count)
        for side, count in ((weights[weights < 0], below), (weights[weights > 0], above))
    ]
    return np.concatenate([sides[0], [0.0] * zero, sides[1]])


# --- Level sets and initialisation


def test_sizes_of_the_level_sets():
    for bits in BITS:
        half = 2**bits // 2
        assert side_sizes(bits, "symmetric") == (half - 1, half - 1)
        assert side_sizes(bits, "full") == (half - 1, half)
        assert side_sizes(bits, "no_zero") == (half, half)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_number_of_levels_and_the_zero(initialization):
    for level_set, num_levels in (("symmetric", 7), ("full", 8), ("no_zero", 8)):
        options = {"initialization": initialization, "level_set": level_set}
        quantizer = calibrated(torch.randn(8, 50), **options)
        assert len(AdqWeightQuantizer(3, **options).codebook) == num_levels
        assert len(quantizer.levels().unique()) == num_levels
        assert (0 in quantizer.levels()) == (level_set != "no_zero")
        assert torch.equal(quantizer.pinned, quantizer.levels() == 0)


def quantile_codebook(weights, bits, level_set):
    return _with_zero(_side_quantiles([weights], bits, level_set), level_set)[0]


def test_quantile_codebook_of_known_weights():
    weights = torch.tensor([4.0, -1.0, 2.0, -3.0, 3.0, -2.0, 1.0, 0.0, -4.0])
    assert quantile_codebook(weights, 2, "symmetric").tolist() == [-2.5, 0, 2.5]
    assert quantile_codebook(weights, 2, "full").tolist() == [-2.5, 0, 1.75, 3.25]
    assert quantile_codebook(weights, 2, "no_zero").tolist() == [-3.25, -1.75, 1.75, 3.25]
    assert quantile_codebook(weights, 3, "symmetric").tolist() == pytest.approx(
        [-3.5, -2.5, -1.5, 0, 1.5, 2.5, 3.5]
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 300), st.sampled_from(BITS))
def test_quantile_codebook_is_numpys(seed, count, bits):
    weights = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    weights[:2] = -0.5, 0.5
    half = 2 ** (bits - 1)
    for level_set, below, above in (
        ("symmetric", half - 1, half - 1),
        ("full", half - 1, half),
        ("no_zero", half, half),
    ):
        expected = quantiles_of_sides(weights, below, above, level_set != "no_zero")
        codebook = quantile_codebook(torch.from_numpy(weights), bits, level_set)
        np.testing.assert_allclose(codebook, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_side_without_weights_gives_its_levels_to_the_other(sign):
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    expected = [0.0, *np.quantile(weights, (np.arange(6) + 0.5) / 6)]
    codebook = quantile_codebook(sign * weights, 3, "symmetric")
    assert codebook.tolist() == pytest.approx(sorted(sign * x for x in expected))


DEGENERATE = {
    "constant": torch.full((4, 6), 0.7),
    "negative constant": torch.full((4, 6), -0.7),
    "zeros": torch.zeros(4, 6),
    "one-sided": torch.linspace(0.1, 2, 24).view(4, 6),
    "negative": -torch.linspace(0.1, 2, 24).view(4, 6),
    "few distinct": torch.tensor([-1.0, 0.0, 0.5]).repeat(8).view(4, 6),
    "one channel of zeros": torch.cat([torch.zeros(1, 6), torch.linspace(-1, 1, 18).view(3, 6)]),
    "huge": torch.linspace(-1e30, 0.6e30, 24).view(4, 6),
    "tiny": torch.linspace(-1e-30, 0.6e-30, 24).view(4, 6),
    "single": torch.tensor([[-3.0]]),
}


@pytest.mark.parametrize("weight", DEGENERATE.values(), ids=DEGENERATE.keys())
@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_degenerate_weights_give_a_valid_codebook(initialization, weight):
    for level_set, granularity, bits in product(LEVEL_SETS, GRANULARITIES, (2, 3, 8)):
        quantizer = calibrated(
            weight,
            bits,
            initialization=initialization,
            level_set=level_set,
            granularity=granularity,
        )
        # Zeros stay zeros: a layer that has many gets a level for them.
        is_full = level_set == "no_zero" and (weight == 0).float().mean() >= 1e-3
        assert quantizer.level_set == ("full" if is_full else level_set)
        has_zero = quantizer.level_set != "no_zero"
        for _ in range(2):
            codebook = quantizer.levels()
            num_levels = sum(side_sizes(bits, quantizer.level_set)) + has_zero
            assert len(codebook) == len(quantizer.pinned) == num_levels
            assert torch.isfinite(codebook).all()
            assert (codebook.diff() >= 0).all()
            assert quantizer.pinned.sum() == has_zero
            assert (codebook[quantizer.pinned] == 0).all()
            scaled = weight / quantizer.scale
            nearest = (scaled[..., None] - codebook).abs().amin(-1)
            error = (quantizer(weight) / quantizer.scale - scaled).abs()
            torch.testing.assert_close(
                error, nearest, rtol=1e-4, atol=1e-6 * float(scaled.abs().max())
            )
            quantizer.adapt(weight)


@pytest.mark.parametrize("initialization", ["quantile", "kmeans", "uniform"])
def test_codebooks_scale_with_the_weights(initialization):
    for level_set, factor in product(LEVEL_SETS, (1e-30, 1e30)):
        weight = torch.randn(4, 50)
        one, other = (
            calibrated(w, initialization=initialization, level_set=level_set)
            for w in (weight, weight * factor)
        )
        torch.testing.assert_close(other.codebook / factor, one.codebook)


def test_uniform_codebook_is_even_and_the_best_of_its_candidates():
    def error(levels):
        return np.square(values[:, None] - levels).min(1).mean()

    for level_set, bits in product(LEVEL_SETS, (2, 3, 5)):
        weights = torch.randn(500)
        below, above = side_sizes(bits, level_set)
        offset = 0.5 if level_set == "no_zero" else 0.0
        shape = np.arange(-below, above + (level_set != "no_zero")) + offset
        values = weights.double().numpy()
        codebook = uniform_codebook(weights, bits, level_set).double().numpy()

        step = codebook[-1] / shape[-1]
        np.testing.assert_allclose(codebook, step * shape, rtol=1e-5, atol=1e-7)
        reach = max(values.max() / above, -values.min() / below)
        best = min(error(shape * reach * k / 100) for k in range(1, 101))
        assert error(codebook) <= best * (1 + 1e-4)


@pytest.mark.parametrize("level_set", LEVEL_SETS)
def test_uniform_codebook_of_one_side_mirrors_that_of_the_other(level_set):
    weights = torch.randn(500).abs()
    codebook = uniform_codebook(weights, 3, level_set)
    assert codebook[0] >= 0
    assert codebook[-1] > 1
    torch.testing.assert_close(uniform_codebook(-weights, 3, level_set), -codebook.flip(0))


@pytest.mark.parametrize("level_set", LEVEL_SETS)
def test_uniform_codebook_sees_every_position_of_the_kernels(level_set):
    # 9 × 2^16 weights: every ninth of them is the same corner of a kernel.
    weight = torch.randn(256, 256, 3, 3)
    weight[..., 0, 0] *= 0.01
    codebook = uniform_codebook(weight.flatten(), 4, level_set)
    assert codebook[-1] > 1.5


def test_kmeans_initialisation_is_that_of_scikit_learn():
    weight = torch.randn(4, 50)
    start = quantiles_of_sides(weight.numpy(), 4, 4, zero=False)
    reference = KMeans(8, init=start[:, None], n_init=1, max_iter=1000, tol=0)
    expected = np.sort(reference.fit(weight.view(-1, 1).numpy()).cluster_centers_[:, 0])
    quantizer = calibrated(weight, initialization="kmeans", level_set="no_zero")
    np.testing.assert_allclose(quantizer.levels(), expected, atol=1e-5)


def test_random_codebook_is_drawn_from_each_side_with_the_seed():
    weights = torch.randn(300)
    first, again, other = (random_codebook(weights, 4, "full", seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.isin(first, torch.cat([weights, torch.zeros(1)])).all()
    assert ((first < 0).sum(), (first > 0).sum()) == (7, 8)


# --- Forward and backward


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forward_gives_the_levels_that_the_codes_stand_for(granularity):
    weight = torch.randn(5, 4, 3, 3)
    quantizer = calibrated(weight, granularity=granularity)
    codes = quantizer.quantize(weight)
    assert codes.dtype == torch.uint8
    assert torch.equal(quantizer(weight), quantizer.levels()[codes.long()] * quantizer.scale)


def test_channel_granularity_is_a_shared_codebook_of_scaled_channels():
    weight = torch.randn(6, 3, 3) * torch.logspace(-2, 2, 6).view(6, 1, 1)
    weight.requires_grad_()
    quantizer = calibrated(weight, granularity="channel")

    scales = [channel.abs().mean().item() for channel in weight]
    scaled = np.stack([c.detach().numpy() / s for c, s in zip(weight, scales, strict=True)])
    codebook = quantiles_of_sides(scaled, 3, 3, zero=True)
    np.testing.assert_allclose(quantizer.levels(), codebook, rtol=1e-4)
    expected = [
        s * codebook[np.abs(c[..., None] - codebook).argmin(-1)]
        for c, s in zip(scaled, scales, strict=True)
    ]
    quantized = quantizer(weight)
    np.testing.assert_allclose(quantized.detach(), np.stack(expected), rtol=1e-4)

    incoming = torch.randn(6, 3, 3)
    quantized.backward(incoming)
    torch.testing.assert_close(weight.grad, incoming)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_straight_through_gradient(granularity):
    weight = torch.randn(4, 30, requires_grad=True)
    quantizer = calibrated(weight, granularity=granularity)
    incoming = torch.randn(4, 30)
    quantizer(weight).backward(incoming)
    torch.testing.assert_close(weight.grad, incoming)


# --- Adaptation


def state(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def assert_unchanged(quantizer, before):
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def lloyd_by_hand(weights, codebook, fixed):
    """Lloyd–Max in plain numpy: each level but the fixed one moves to the mean of its cell."""
    levels = np.array(codebook, dtype=np.float64)
    for _ in range(1000):
        nearest = np.abs(weights[:, None] - levels).argmin(1)
        for k in set(nearest) - {fixed}:
            levels[k] = weights[nearest == k].mean()
    return levels


def test_one_centroid_step_is_the_formula():
    weight, decay = torch.randn(4, 50), 0.9
    quantizer = calibrated(weight, decay=decay)
    moved = weight + 0.1 * torch.randn(4, 50)
    codebook = quantizer.levels().tolist()

    counts, new_counts, new_sums = np.zeros(7), np.zeros(7), np.zeros(7)
    for before, after in zip(weight.flatten().tolist(), moved.flatten().tolist(), strict=True):
        counts[np.abs(before - np.array(codebook)).argmin()] += 1
        nearest = np.abs(after - np.array(codebook)).argmin()
        new_counts[nearest] += 1
        new_sums[nearest] += after
    expected_counts = decay * counts + (1 - decay) * new_counts
    expected_sums = decay * counts * codebook + (1 - decay) * new_sums
    expected = expected_sums / expected_counts
    expected[3] = 0  # pinned

    quantizer.adapt(moved)

    np.testing.assert_allclose(quantizer.counts, expected_counts, rtol=1e-5)
    np.testing.assert_allclose(quantizer.sums, expected_sums, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(quantizer.levels(), expected, rtol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("level_set", LEVEL_SETS)
def test_centroids_converge_to_lloyd_max_at_fixed_weights(level_set, decay):
    # Clusters far apart, so that fast and slow steps from one start end at the same codebook.
    num_levels = 7 if level_set == "symmetric" else 8
    centers = torch.arange(num_levels) - (3.5 if level_set == "no_zero" else 3)
    weight = centers + 0.2 * torch.rand(20, num_levels)
    quantizer = calibrated(weight, level_set=level_set, decay=decay)
    fixed = None if level_set == "no_zero" else quantizer.levels().tolist().index(0)
    expected = lloyd_by_hand(weight.flatten().numpy(), quantizer.levels(), fixed)
    assert np.abs(quantizer.levels() - expected).max() > 1e-3  # there is a way to go

    for _ in range(300):
        quantizer.adapt(weight)

    np.testing.assert_allclose(quantizer.levels(), expected, atol=1e-5)


def slow_ema(weights_of_steps, codebook, fixed, decay):
    """The EMA of the codebook, weight by weight, in Python's own float64."""
    levels, counts = list(codebook), [0.0] * len(codebook)

    def nearest(value):
        return min(range(len(levels)), key=lambda k: abs(value - levels[k]))

    for value in weights_of_steps[0]:
        counts[nearest(value)] += 1
    sums = [n * c for n, c in zip(counts, levels, strict=True)]
    for weights in weights_of_steps[1:]:
        new_counts, new_sums = [0.0] * len(levels), [0.0] * len(levels)
        for value in weights:
            k = nearest(value)
            new_counts[k] += 1
            new_sums[k] += value
        for k in range(len(levels)):
            counts[k] = decay * counts[k] + (1 - decay) * new_counts[k]
            sums[k] = decay * sums[k] + (1 - decay) * new_sums[k]
            if k != fixed:
                levels[k] = sums[k] / counts[k]
    return levels, counts, sums


@pytest.mark.parametrize("decay", [0.5, 0.99])
@pytest.mark.parametrize("level_set", LEVEL_SETS)
def test_many_centroid_steps_are_those_of_a_slow_loop(level_set, decay):
    steps = [torch.randn(4, 30)]
    for _ in range(40):
        steps.append(steps[-1] + 0.05 * torch.randn(4, 30))
    quantizer = calibrated(steps[0], level_set=level_set, decay=decay)
    codebook = quantizer.levels().tolist()
    fixed = None if level_set == "no_zero" else codebook.index(0)
    for weight in steps[1:]:
        quantizer.adapt(weight)
    drawn = [weight.flatten().tolist() for weight in steps]
    levels, counts, sums = slow_ema(drawn, codebook, fixed, decay)
    assert max(abs(a - b) for a, b in zip(levels, codebook, strict=True)) > 0.02  # it did move
    np.testing.assert_allclose(quantizer.levels(), levels, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(quantizer.counts, counts, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(quantizer.sums, sums, rtol=1e-3, atol=1e-3)


# Distribution function, ∫ t f(t) dt from -∞, and inverse distribution function, in closed form.
DENSITIES = {
    "gauss": (stats.norm.cdf, lambda x: -stats.norm.pdf(x), stats.norm.ppf),
    "laplace": (
        stats.laplace.cdf,
        lambda x: -0.5 * np.exp(-abs(x)) * (1 + abs(x)),
        stats.laplace.ppf,
    ),
}


def lloyd_max_of_density(cdf, moment, num_levels):
    """The Lloyd–Max codebook of a density: for these two it is unique."""
    levels = np.linspace(-2, 2, num_levels)
    for _ in range(1500):
        inner = (levels[1:] + levels[:-1]) / 2
        mass = np.diff(np.concatenate([[0.0], cdf(inner), [1.0]]))
        levels = np.diff(np.concatenate([[0.0], moment(inner), [0.0]])) / mass
    return levels


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("level_set", "num_levels"), [("symmetric", 7), ("no_zero", 8)])
def test_centroids_end_at_the_lloyd_max_codebook_of_a_density(density, level_set, num_levels):
    cdf, moment, ppf = DENSITIES[density]
    # The weights are the means of cells of equal mass, so that no draw disturbs the comparison.
    inner = moment(ppf(np.arange(1, 8_000) / 8_000))
    weight = torch.from_numpy(8_000 * np.diff([0.0, *inner, 0.0])).float().view(20, -1)
    quantizer = calibrated(weight, level_set=level_set, decay=0.5)
    expected = lloyd_max_of_density(cdf, moment, num_levels)
    assert np.abs(quantizer.levels().numpy() - expected).max() > 0.1
    for _ in range(300):
        quantizer.adapt(weight)
    # Steps end where no weight changes its cell any more, a little before the density's optimum.
    np.testing.assert_allclose(quantizer.levels(), expected, rtol=0.005, atol=0.005)


@pytest.fixture(scope="module")
def trained_weight():
    """The weights of a linear classifier of the digits, trained for a moment."""
    digits = load_digits()
    images, targets = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    layer = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(images), targets).backward()
        optimizer.step()
    assert (layer(images).argmax(1) == targets).float().mean() > 0.9
    return layer.weight.detach()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_centroids_end_at_a_lloyd_max_codebook_of_trained_weights(trained_weight, bits):
    quantizer = calibrated(trained_weight, bits, decay=0.8)
    before = (quantizer(trained_weight) - trained_weight).square().mean()
    for _ in range(400):
        quantizer.adapt(trained_weight)
    levels = quantizer.levels().double().numpy()
    weights = trained_weight.flatten().double().numpy()
    moved = lloyd_by_hand(weights, levels, levels.tolist().index(0))
    np.testing.assert_allclose(levels, moved, atol=1e-5)
    assert (quantizer(trained_weight) - trained_weight).square().mean() < before


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_centroids_end_at_the_means_of_their_cells(granularity):
    weight = torch.randn(10, 40)
    quantizer = calibrated(weight, bit_width=4, granularity=granularity, decay=0.8)
    for _ in range(500):
        quantizer.adapt(weight)
    scaled = (weight / quantizer.scale).flatten()
    nearest = (scaled[:, None] - quantizer.levels()).abs().argmin(1)
    for k, level in enumerate(quantizer.levels()):
        if level != 0:
            torch.testing.assert_close(level, scaled[nearest == k].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_levels_keep_their_ratio_to_the_quantiles(initialization):
    for level_set in LEVEL_SETS:
        options = {"initialization": initialization, "level_set": level_set}
        first = torch.randn(4, 50)
        quantizer = calibrated(first, adaptation="quantile", decay=0.8, **options)
        sides = (*side_sizes(3, level_set), level_set != "no_zero")
        before = quantiles_of_sides(first.numpy(), *sides)
        ratio = np.divide(quantizer.levels(), before, where=before != 0, out=np.ones_like(before))
        if initialization == "quantile":
            np.testing.assert_allclose(ratio, 1, rtol=1e-6)
        weight = 2 * torch.randn(4, 50) + 0.3
        for _ in range(200):
            quantizer.adapt(weight)
        expected = np.sort(ratio * quantiles_of_sides(weight.numpy(), *sides))
        np.testing.assert_allclose(quantizer.levels(), expected, rtol=1e-4, atol=1e-6)


def test_followed_together_is_followed_one_by_one():
    """Also layers without a negative weight, of few weights, and of all other kinds."""
    torch.manual_seed(0)
    kinds = [
        {"level_set": x, "granularity": g, "adaptation": a}
        for x in LEVEL_SETS for g in GRANULARITIES for a in ADAPTATIONS
    ]  # fmt: skip
    shapes = [(6, 9), (40, 80), (3, 3)]
    alone, weights = [], []
    for kind in kinds:
        for shape in shapes:
            quantizer = AdqWeightQuantizer(3, decay=0.5, **kind)
            quantizer.calibrate(torch.randn(shape))
            alone.append(quantizer)
            weights.append(torch.randn(shape) if shape != (6, 9) else torch.rand(shape))
    together = copy.deepcopy(alone)
    for _ in range(2):
        before = [quantizer.codebook for quantizer in together]
        kept = [codebook.clone() for codebook in before]
        AdqWeightQuantizer.adapt_all(together, weights)
        assert all(map(torch.equal, before, kept))  # who holds the old ones keeps them
        for quantizer, weight in zip(alone, weights, strict=True):
            quantizer.adapt(weight)
    for first, second in zip(alone, together, strict=True):
        assert same_state(first, second), first
        assert second.codebook.untyped_storage().nbytes() == second.codebook.nbytes


def same_state(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_one_quantile_step_is_the_formula():
    weight = torch.randn(4, 50)
    quantizer = calibrated(weight, adaptation="quantile", decay=0.9)
    before, moved = quantizer.levels(), weight + 0.1
    quantizer.adapt(moved)
    expected = 0.9 * before.numpy() + 0.1 * quantiles_of_sides(moved.numpy(), 3, 3, zero=True)
    np.testing.assert_allclose(quantizer.levels(), expected, rtol=1e-4)


@pytest.mark.parametrize("adaptation", ["centroid", "quantile"])
def test_channel_scales_follow_the_weights(adaptation):
    weight = torch.randn(4, 50)
    quantizer = calibrated(weight, granularity="channel", adaptation=adaptation, decay=0.9)
    reference = calibrated(weight, granularity="channel", adaptation=adaptation, decay=0.9)
    factors = torch.tensor([[0.1], [1.0], [10.0], [100.0]])
    reference.adapt(weight)
    quantizer.adapt(factors * weight)
    # The codebook is of scaled weights, so a change of scale alone does not touch it.
    torch.testing.assert_close(quantizer.levels(), reference.levels())
    torch.testing.assert_close(quantizer(factors * weight), factors * reference(weight))


@pytest.mark.parametrize("sign", [-1, 1])
def test_quantiles_follow_weights_to_one_side_and_back_around_the_zero(sign):
    quantizer = calibrated(torch.randn(4, 50), adaptation="quantile", decay=0.5)
    for weight in (sign * (torch.rand(4, 50) + 0.1), torch.randn(4, 50)):
        for _ in range(60):
            quantizer.adapt(weight)
        np.testing.assert_allclose(
            quantizer.levels(), quantile_codebook(weight.flatten(), 3, "symmetric"), atol=1e-5
        )
        assert torch.equal(quantizer.pinned, quantizer.levels() == 0)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_order_and_zero_outlive_drifting_weights(adaptation):
    for level_set, granularity in product(LEVEL_SETS, GRANULARITIES):
        quantizer = calibrated(
            torch.randn(6, 20),
            level_set=level_set,
            adaptation=adaptation,
            granularity=granularity,
            decay=0.7,
        )
        weight = torch.randn(6, 20)
        for step in range(200):
            # Now on both sides of zero, now on one of them, at scales from 1e-3 to 1e3.
            drifted = (weight + 4 * np.sin(step / 20)) * 10 ** (3 * np.sin(step / 30))
            quantizer.adapt(drifted)
            weight += 0.05 * torch.randn(6, 20)
            levels = quantizer.levels()
            assert torch.isfinite(levels).all()
            assert (levels.diff() >= 0).all()
            assert quantizer.pinned.sum() == (level_set != "no_zero")
            assert (levels[quantizer.pinned] == 0).all()


def test_without_adaptation_nothing_moves():
    quantizer = calibrated(torch.randn(4, 50), adaptation="none", granularity="channel")
    before = state(quantizer)
    quantizer.adapt(torch.randn(4, 50))
    assert_unchanged(quantizer, before)


# --- Dead levels


CODEBOOK = torch.tensor([-1.0, 0.0, 1.0, 2.0])
PINNED = torch.tensor([False, True, False, False])


def revive(counts, sums, reach=(-1.6, 3.0)):
    reach = tuple(torch.tensor(x) for x in reach)
    return revive_dead_level(CODEBOOK, torch.tensor(counts), torch.tensor(sums), PINNED, reach)


def test_a_dead_level_takes_half_of_the_most_populated_cell():
    codebook, counts, sums = revive([4.0, 10.0, 8.0, 0.1], [-4.0, 1.0, 8.0, 0.2])
    # The cell of 0 ends at ±0.5; its borders are equally far and the upper one is taken.
    assert codebook.tolist() == [-1.0, 0.0, 1.0, 0.25]
    assert counts.tolist() == [4.0, 5.0, 8.0, 5.0]
    assert sums.tolist() == [-4.0, 0.5, 8.0, 1.25]


def test_a_dead_level_moves_towards_the_farther_border():
    codebook, counts, sums = revive([9.0, 0.0, 0.2, 4.0], [-9.0, 0.0, 0.2, 8.0])
    # The cell of -1 reaches from the smallest weight, -1.6, to -0.5. The empty zero is no
    # dead level: it is pinned.
    assert codebook.tolist() == pytest.approx([-1.0, 0.0, -1.3, 2.0])
    assert counts.tolist() == [4.5, 0.0, 4.5, 4.0]
    assert sums.tolist() == pytest.approx([-4.5, 0.0, -4.5 * 1.3, 8.0])


def test_no_level_moves_that_is_alive_or_where_there_is_nothing_to_share():
    for counts in ([4.0, 10.0, 8.0, 0.6], [1.0, 1.9, 1.0, 0.1]):
        sums = [c * x for c, x in zip(counts, CODEBOOK.tolist(), strict=True)]
        codebook, new_counts, new_sums = revive(counts, sums)
        assert torch.equal(codebook, CODEBOOK)
        assert new_counts.tolist() == pytest.approx(counts)
        assert new_sums.tolist() == pytest.approx(sums)


def quantizer_with_an_abandoned_level(**options):
    """Its top level, 10, has lost all of its weights; those of 1 have spread over 0.6 … 1.4."""
    weight = torch.tensor([-1.0] * 20 + [1.0] * 30 + [10.0] * 20).view(7, 10)
    quantizer = calibrated(weight, 2, level_set="full", **options)
    assert quantizer.levels().tolist() == [-1.0, 0.0, 1.0, 10.0]
    return quantizer, torch.cat([torch.full((20,), -1.0), torch.linspace(0.6, 1.4, 50)]).view(7, 10)


def test_a_revived_level_stays_where_it_was_put():
    quantizer, weight = quantizer_with_an_abandoned_level(decay=0.5)
    step = 0
    while quantizer.levels()[-1] > 5:
        total = quantizer.counts.sum()
        quantizer.adapt(weight)
        step += 1
    # 20 halved falls below 0.5 for the first time at the sixth step.
    assert step == 6
    # Between the mean of the crowded cell and its farther border, the largest weight or 0.5.
    lower, upper = quantizer.levels()[[0, 1, 2, 3]][2:]
    assert 0.5 < lower < upper < 1.4
    assert torch.equal(quantizer.pinned, torch.tensor([False, True, False, False]))
    # Both halves of the crowded cell have the same count, and nothing of the old state remains.
    assert quantizer.counts[2] == quantizer.counts[3]
    assert quantizer.counts.sum() == pytest.approx(float(total), abs=0.5)
    revived = (quantizer.sums / quantizer.counts - quantizer.levels()).abs()[[2, 3]]
    assert (revived < 1e-5).all()

    for _ in range(50):
        quantizer.adapt(weight)
        assert 0.5 < quantizer.levels()[2] < quantizer.levels()[3] < 1.4
    # And the cell is shared: each level ends at the mean of one half of 0.6 … 1.4.
    torch.testing.assert_close(quantizer.levels()[2:], torch.tensor([0.8, 1.2]), atol=0.02, rtol=0)


def test_a_revived_level_that_passes_others_takes_its_state_along():
    quantizer, _ = quantizer_with_an_abandoned_level(decay=0.5)
    # Now -1 is abandoned, and lands beyond the zero.
    weight = torch.cat([torch.linspace(0.6, 1.4, 50), torch.full((20,), 10.0)])
    step = 0
    while quantizer.levels()[0] < 0:
        quantizer.adapt(weight)
        step += 1
    assert step == 6
    assert quantizer.pinned.tolist() == [True, False, False, False]
    # Halfway from 1 to the border of its cell, which is halfway from 1 to 10.
    torch.testing.assert_close(quantizer.levels()[1:3], torch.tensor([1.0, 3.25]))
    assert quantizer.counts[1] == quantizer.counts[2]
    assert quantizer.counts[3] == 20
    torch.testing.assert_close((quantizer.sums / quantizer.counts)[1:], quantizer.levels()[1:])


# --- Options


@pytest.mark.parametrize(
    "options",
    [
        {"initialization": "quantiles"},
        {"level_set": "half"},
        {"granularity": "tensor"},
        {"adaptation": "mean"},
        {"decay": 1.0},
        {"decay": -0.1},
        {"decay": float("nan")},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        AdqWeightQuantizer(2, **options)


def test_the_bit_width_is_shown():
    assert "bit_width=5" in repr(AdqWeightQuantizer(5))


def test_a_subclass_that_adapts_otherwise_is_asked_also_where_quantizers_follow_together():
    class Other(AdqWeightQuantizer):
        def adapt(self, weight):
            super().adapt(weight)
            self.codebook = self.codebook + 1

    class Below(Other):
        pass

    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    plain, other, below = AdqWeightQuantizer(2), Other(2), Below(2)
    for quantizer in (plain, other, below):
        quantizer.calibrate(weight)
        type(quantizer).adapt_all([quantizer], [0.5 * weight])
    assert torch.equal(other.codebook, plain.codebook + 1)
    assert torch.equal(below.codebook, other.codebook)
