import itertools

import pytest
import torch
from export_helpers import quantized_network
from torch.nn import functional as F

from adq_train.deploy.integer import combine, integer_convolution, partial_sums
from adq_train.deploy.layer_tables import LayerTables, Staircase, WeightTable

GEOMETRIES = [
    {},
    {"padding": (1, 1)},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": (2, 1), "padding": (2, 1)},
    {"groups": 2, "padding": (1, 1)},
    {"groups": 4, "stride": (2, 2), "padding": (1, 1)},  # depthwise
]


@pytest.mark.parametrize("how", GEOMETRIES)
def test_sums_are_exact_by_brute_force(how):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(-8, 8, (2, 4, 5, 6), generator=generator)
    codes = torch.randint(3, (4, 4 // how.get("groups", 1), 3, 2), generator=generator)
    sums = partial_sums(inputs, codes.to(torch.uint8), 3, **how)
    for k in range(3):
        # Integers below 2^53 are exact in float64, whatever the order of the sum.
        expected = F.conv2d(inputs.double(), (codes == k).double(), **how)
        assert torch.equal(sums[:, :, k].double(), expected)
    assert sums.dtype is torch.int64


def test_sums_by_hand():
    inputs = torch.tensor([1, 2, 3, 4]).view(1, 1, 2, 2)
    codes = torch.tensor([0, 1, 1, 2]).view(1, 1, 2, 2)
    assert partial_sums(inputs, codes, 4).flatten().tolist() == [1, 5, 4, 0]
    sums = partial_sums(inputs, codes, 4)
    output = combine(sums, torch.tensor([10.0, 1.0, -1.0, 5.0]), torch.tensor(2.0), None)
    assert output.item() == 2 * (10 * 1 + 1 * 5 - 1 * 4)


@pytest.mark.parametrize(
    ("how", "scaled", "zero_point"), itertools.product(GEOMETRIES, [True, False], [0, 3])
)
def test_the_integer_path_is_the_fake_quantized_convolution(how, scaled, zero_point):
    generator = torch.Generator().manual_seed(1)
    levels = (torch.arange(8) - zero_point) * torch.tensor(0.37)
    stairs = Staircase(3, torch.randn(7, generator=generator).sort().values, levels)
    codebook = torch.randn(7, generator=generator).sort().values
    codes = torch.randint(7, (4, 4 // how.get("groups", 1), 3, 3), generator=generator)
    scale = torch.rand(4, generator=generator) + 0.5 if scaled else None
    table = WeightTable(3, codes.to(torch.uint8), codebook, scale)
    x, bias = torch.randn(2, 4, 7, 8, generator=generator), torch.randn(4, generator=generator)
    quantized = levels[torch.bucketize(x, stairs.thresholds)].double()
    weight = codebook.double()[codes]
    if scale is not None:
        weight = weight * scale.double().view(-1, 1, 1, 1)
    expected = F.conv2d(quantized, weight, bias.double(), **how)
    actual = integer_convolution(x, LayerTables(table, stairs), bias, **how)
    # Levels are float32, so step * code is rounded there and exact here.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_trained_layers_take_the_integer_path():
    network, model = quantized_network(bits=3)
    x = torch.randn(2, 4, 8, 8)
    layer, tables = network.layer1[0].conv1, model.layers["layer1.0.conv1"]
    with torch.no_grad():
        expected = layer(x).double()
    actual = integer_convolution(x, tables, padding=(1, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_uneven_levels_have_no_integer_path():
    stairs = Staircase(2, torch.zeros(3), torch.tensor([0.0, 1.0, 3.0, 4.0]))
    table = WeightTable(2, torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.ones(1), None)
    with pytest.raises(ValueError, match="not multiples of one step"):
        integer_convolution(torch.zeros(1, 1, 2, 2), LayerTables(table, stairs))
