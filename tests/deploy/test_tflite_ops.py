"""Each operation against its definition, computed in float64, on LiteRT's own kernels.

Kernels scale by fixed-point numbers and some round twice, so a code may differ by one where the
exact value lies close to the middle of two.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tflite_helpers import IMAGES, KERNELS, run_layers
from torch.nn import functional as F

from adq_train.deploy.tflite_ops import Grid, Target, Weighted, Window

STEP8 = np.float64(np.float32(IMAGES.step))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=KERNELS)
def kernels(request):
    return request.param


def on_grid(values, grid):
    """Codes of exact values."""
    step = np.float64(np.float32(grid.step))
    return np.clip(np.rint(values / step), grid.low, grid.high)


def assert_close(got, wanted, share=0.005):
    """Codes that differ by one at most, and few of them."""
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 1
    assert (got != wanted).mean() <= share
    assert len(np.unique(wanted)) > 1


def channels_last(x):
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def random_layer(rng, shape, bias=True):
    codes = rng.integers(-127, 128, shape)
    scale = rng.uniform(0.0005, 0.002, shape[0])
    return Weighted(codes, scale, rng.normal(0, 3, shape[0]) if bias else None)


def exact_layer(layer, x, operation):
    """A layer on exact values (N, C, …) in float64."""
    along = [-1] + [1] * (layer.codes.ndim - 1)
    weight = layer.codes * layer.scale.astype(np.float32).astype(np.float64).reshape(along)
    bias = None if layer.bias is None else torch.from_numpy(layer.bias)
    return operation(torch.from_numpy(x), torch.from_numpy(weight), bias).numpy()


CONVOLUTIONS = {
    "3 × 3": (8, 12, (3, 3), {"padding": 1}),
    "3 × 3, every other pixel": (8, 12, (3, 3), {"padding": 1, "stride": 2}),
    "1 × 1, every other pixel": (8, 12, (1, 1), {"stride": 2}),
    "5 × 3, uneven padding": (4, 6, (5, 3), {"padding": (2, 0)}),
    "padding beyond same": (4, 6, (3, 3), {"padding": 2}),
    "dilated": (4, 6, (3, 3), {"padding": 2, "dilation": 2}),
    "grouped": (8, 12, (3, 3), {"padding": 1, "groups": 4}),
    "depthwise": (8, 8, (3, 3), {"padding": 1, "groups": 8}),
    "depthwise, two each, every other": (8, 16, (3, 3), {"padding": 1, "stride": 2, "groups": 8}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
@pytest.mark.parametrize("grid", [Grid(0.6, 0, 7), Grid(0.05, -128, 127)], ids=["W3", "signed"])
def test_convolution(rng, kernels, case, grid):
    c_in, c_out, kernel, geometry = case
    groups = geometry.get("groups", 1)
    layer = random_layer(rng, (c_out, c_in // groups, *kernel), bias=c_in == 8)
    codes = rng.integers(-128, 128, (2, c_in, 8, 10))
    exact = exact_layer(layer, codes * STEP8, lambda x, w, b: F.conv2d(x, w, b, **geometry))
    pair = {k: v if isinstance(v, tuple) else (v, v) for k, v in geometry.items() if k != "groups"}
    window = Window(kernel, **{"stride": (1, 1), **pair})

    def write(emitter, x):
        return emitter.convolution(x, layer, window, groups, Target("conv", grid))

    got, _ = run_layers(channels_last(codes), IMAGES, write, kernels)
    assert_close(got, channels_last(on_grid(exact, grid)))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3), (0, 15), (0, 255), (-8, 7), (-2, 1)])
def test_codes_are_clipped_where_the_grid_ends(rng, kernels, low, high):
    # Far beyond the ends, and exactly on codes: no rounding, so every code must be right.
    layer = Weighted(np.full((1, 1), 127), np.array([1 / 127]), None)
    grid = Grid(IMAGES.step / (32 if high == 255 else 1), low, high)
    codes = np.arange(-128, 128).reshape(-1, 1)

    def write(emitter, x):
        return emitter.linear(x, layer, Target("fc", grid))

    got, _ = run_layers(codes, IMAGES, write, kernels)
    wanted = on_grid(codes * STEP8, grid)
    assert {wanted.min(), wanted.max()} == {low, high}
    assert np.array_equal(got, wanted)


@given(
    ratio=st.floats(0.02, 50),
    high=st.sampled_from([1, 3, 7, 15, 31, 255]),
    signed=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_from_one_grid_to_another_every_code_is_right(ratio, high, signed):
    grid = Grid(
        IMAGES.step * ratio, -(high + 1) // 2 if signed else 0, high // 2 if signed else high
    )
    codes = np.arange(-128, 128).reshape(-1, 1)
    exact = codes * STEP8 / np.float64(np.float32(grid.step))
    codes = codes[np.abs(exact % 1 - 0.5) > 1e-4].reshape(-1, 1)
    for kernels in KERNELS:
        got, _ = run_layers(codes, IMAGES, lambda e, x: e.rescale(x, grid, "scaled"), kernels)
        assert np.array_equal(got, on_grid(codes * STEP8, grid))


def test_a_grid_within_its_own_takes_no_operation():
    from adq_train.deploy.tflite_ops import Emitter

    emitter = Emitter()
    x = emitter.rescale(emitter.input("images", (1, 4)), Grid(0.1, 0, 7), "codes")
    before = len(emitter.operations)
    assert emitter.rescale(x, Grid(0.1, 0, 15), "same") is x
    assert len(emitter.operations) == before
    assert emitter.rescale(x, Grid(0.1, 0, 3), "narrower").high == 3
    assert len(emitter.operations) == before + 2 - 1


def test_add(rng, kernels):
    layer = random_layer(rng, (6, 6, 1, 1))
    codes, half = rng.integers(-128, 128, (2, 6, 5, 5)), Grid(0.0317, -128, 127)
    other = on_grid(exact_layer(layer, codes * STEP8, F.conv2d), half)
    exact = codes * STEP8 + other * np.float64(np.float32(half.step))

    def write(emitter, x):
        window = Window((1, 1), (1, 1))
        b = emitter.convolution(x, layer, window, 1, Target("conv", half))
        return emitter.add(x, b, Grid(0.913, 0, 7), "sum")

    got, _ = run_layers(channels_last(codes), IMAGES, write, kernels)
    assert_close(got, channels_last(on_grid(exact, Grid(0.913, 0, 7))))


def test_concatenate_grids_of_different_zero_points(rng, kernels):
    codes, few, grid = (
        rng.integers(-128, 128, (2, 3, 4, 4)),
        Grid(0.113, 0, 7),
        Grid(0.0719, -128, 127),
    )
    small = on_grid(codes * STEP8, few) * np.float64(np.float32(few.step))
    exact = np.concatenate([small, codes * STEP8, small], 1)

    def write(emitter, x):
        a = emitter.rescale(x, few, "few")
        return emitter.concatenate([a, x, a], grid, "cat")

    got, _ = run_layers(channels_last(codes), IMAGES, write, kernels)
    assert np.array_equal(got, channels_last(on_grid(exact, grid)))


@pytest.mark.parametrize("keep", [False, True])
def test_mean_rounds_once(rng, kernels, keep):
    codes, grid = rng.integers(-128, 128, (4, 16, 5, 7)), Grid(0.011, -128, 127)
    exact = (codes * STEP8).mean((2, 3), keepdims=keep)
    write = lambda emitter, x: emitter.mean(x, keep, Target("mean", grid))  # noqa: E731
    got, _ = run_layers(channels_last(codes), IMAGES, write, kernels)
    # The plain kernels round small sums twice.
    share = {"xnnpack": 0.005, "reference": 0.25}[kernels]
    assert_close(got, channels_last(on_grid(exact, grid)), share)


def test_average_pool_rounds_once(rng, kernels):
    codes, grid = rng.integers(-128, 128, (2, 4, 8, 8)), Grid(0.013, -128, 127)
    exact = F.avg_pool2d(torch.from_numpy(codes * STEP8), 3, 2, 1).numpy()
    window = Window((3, 3), (2, 2), (1, 1))
    write = lambda emitter, x: emitter.average_pool(x, window, Target("pool", grid))  # noqa: E731
    got, _ = run_layers(channels_last(codes), IMAGES, write, kernels)
    assert_close(got, channels_last(on_grid(exact, grid)))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil"),
    [(2, 2, 0, False), (3, 2, 1, False), (3, 1, 1, False), (3, 2, 0, True), (2, 2, 0, True)],
)
def test_max_pool_takes_no_padding_for_a_value(rng, kernels, kernel, stride, padding, ceil):
    codes = rng.integers(-128, 20, (2, 3, 8, 9))
    images = torch.from_numpy(codes).double()
    exact = F.max_pool2d(images, kernel, stride, padding, ceil_mode=ceil).numpy()
    window = Window((kernel,) * 2, (stride,) * 2, (padding,) * 2)
    if ceil:
        window = window.reaching((8, 9), exact.shape[2:])
    got, _ = run_layers(
        channels_last(codes), IMAGES, lambda e, x: e.max_pool(x, window, "pool"), kernels
    )
    assert exact.min() < 0
    assert np.array_equal(got, channels_last(exact))


def test_shortcut_of_every_other_pixel_with_new_channels(rng, kernels):
    codes = rng.integers(-128, 128, (2, 3, 6, 7))
    exact = np.pad(codes[:, :, ::2, ::3], ((0, 0), (1, 2), (0, 0), (0, 0)))

    def write(emitter, x):
        x = emitter.every(x, (2, 3), "every")
        return emitter.pad(x, [(0, 0), (0, 0), (0, 0), (1, 2)], "pad")

    got, _ = run_layers(channels_last(codes), IMAGES, write, kernels)
    assert np.array_equal(got, channels_last(exact))


def test_gain_and_offset_per_channel(rng, kernels):
    codes, grid = rng.integers(-128, 128, (2, 5, 4, 4)), Grid(0.05, 0, 127)
    gain, bias = np.array([1.5, -0.3, 0.0, 1e-9, 2.0]), np.array([0.1, 2.0, 1.0, 0.5, -3.0])
    exact = codes * STEP8 * gain.reshape(-1, 1, 1) + bias.reshape(-1, 1, 1)
    write = lambda emitter, x: emitter.scale_channels(x, gain, bias, Target("bn", grid))  # noqa: E731
    got, _ = run_layers(channels_last(codes), IMAGES, write, kernels)
    assert_close(got, channels_last(on_grid(exact, grid)))


def test_a_linear_layer_finds_its_columns_behind_an_image(rng, kernels):
    codes, grid = rng.integers(-128, 128, (3, 4, 2, 3)), Grid(0.2, -128, 127)
    layer = random_layer(rng, (6, 24))
    exact = exact_layer(layer, codes.reshape(3, -1) * STEP8, F.linear)

    def write(emitter, x):
        return emitter.linear(emitter.flatten(x, "flat"), layer, Target("fc", grid))

    got, _ = run_layers(channels_last(codes), IMAGES, write, kernels)
    assert_close(got, on_grid(exact, grid), share=0.06)


@pytest.mark.parametrize("grid", [IMAGES, Grid(0.0517, 0, 255)], ids=["signed", "unsigned"])
def test_sixteen_bits_hold_any_logit(rng, kernels, grid):
    """Also the largest that there can be, of an input with the signs of a row of weights."""
    signs = rng.choice([-1, 1], (10, 64))
    layer = Weighted(127 * signs, np.full(10, 0.001), None)
    codes = np.where(np.stack([signs[3], -signs[3]]) > 0, grid.high, grid.low)
    exact = exact_layer(layer, codes * STEP8, F.linear)
    got, step = run_layers(
        codes, grid, lambda e, x: e.linear(x, layer, Target("fc", None)), kernels
    )
    assert 0.5 * step * 32767 < np.abs(exact).max() <= step * 32768
    assert np.abs(got - exact).max() < 0.6 * step


def test_mean_in_sixteen_bits(rng, kernels):
    codes = rng.integers(-128, 128, (3, 8, 4, 4))
    got, step = run_layers(
        channels_last(codes), IMAGES, lambda e, x: e.mean(x, False, Target("mean", None)), kernels
    )
    assert np.abs(got - (codes * STEP8).mean((2, 3))).max() < 1.1 * step


@pytest.mark.parametrize(
    "write",
    [
        lambda e, x: e.add(x, e.pad(x, [(0, 0), (0, 0), (0, 0), (0, 1)], "pad"), IMAGES, "sum"),
        lambda e, x: e.linear(x, Weighted(np.ones((2, 3)), np.ones(2), None), Target("fc", IMAGES)),
        lambda e, x: e.mean(x, False, Target("mean", None, relu=True)),
    ],
    ids=["add", "linear", "mean"],
)
def test_what_cannot_be_written_is_said(write):
    with pytest.raises(ValueError, match=r"adds|dimensions|ReLU"):
        run_layers(np.zeros((1, 2, 2, 3)), IMAGES, write)
