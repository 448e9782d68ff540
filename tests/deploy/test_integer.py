"""The integer path: a convolution that multiplies integers only by codebook entries, at the end.

With inputs x = s · q (q integer, 0 for padding) and weights w = c[k], an output is

    Σ w x = s · Σ_k c_k · S_k,        S_k = Σ of the q whose weight has code k,

so the sums over inputs are integer additions, exact in any order, and K multiplications per
output are left. See docs/export.md for what hardware can make of that. The package does not
compute this way; the reference below proves that its tables allow it.
"""

from itertools import product

import torch
from export_helpers import quantized_network
from torch.nn import functional as F

from adq_train.deploy.layer_tables import LayerTables, Staircase, WeightTable, uniform_grid

GEOMETRIES = [
    {},
    {"padding": (1, 1)},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": (2, 1), "padding": (2, 1)},
    {"groups": 2, "padding": (1, 1)},
    {"groups": 4, "stride": (2, 2), "padding": (1, 1)},  # depthwise
]


def partial_sums(
    inputs, codes, num_levels, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
):
    """S (N, C_out, K, H_out, W_out) of integers q (N, C_in, H, W) by the codes that they meet."""
    num_images, out_channels = len(inputs), len(codes)
    padded = F.pad(inputs.long(), (padding[1], padding[1], padding[0], padding[0]))
    height, width = (
        (padded.shape[2 + i] - dilation[i] * (codes.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    taps = [
        padded[
            :,
            :,
            y * dilation[0] : y * dilation[0] + (height - 1) * stride[0] + 1 : stride[0],
            x * dilation[1] : x * dilation[1] + (width - 1) * stride[1] + 1 : stride[1],
        ]
        for y in range(codes.shape[2])
        for x in range(codes.shape[3])
    ]
    # (N, groups, taps of a group's filters, H_out · W_out), in the order of the weights.
    columns = torch.stack(taps, 2).reshape(num_images, groups, -1, height * width)
    chosen = codes.long().reshape(groups, out_channels // groups, 1, -1)
    selects = (chosen == torch.arange(num_levels).view(-1, 1)).long()
    sums = torch.einsum("gokt,ngtp->ngokp", selects, columns)
    return sums.reshape(num_images, out_channels, num_levels, height, width)


def combine(sums, codebook, scale, bias=None):
    """Outputs (N, C_out, H_out, W_out) from integer sums: scale · Σ_k c_k · S_k + bias."""
    output = torch.einsum("nokhw,k->nohw", sums.double(), codebook.double())
    output = output * scale.double().reshape(-1, 1, 1)
    return output if bias is None else output + bias.double().reshape(-1, 1, 1)


def integer_convolution(x, tables, bias=None, **how):
    """A quantized convolution of float inputs x, by integer sums alone until the last step."""
    step, zero_point = uniform_grid(tables.input.levels)
    inputs = torch.bucketize(x, tables.input.thresholds) - zero_point
    weight = tables.weight
    sums = partial_sums(inputs, weight.codes, len(weight.codebook), **how)
    return combine(
        sums, weight.codebook, step if weight.scale is None else step.double() * weight.scale, bias
    )


def test_sums_are_exact_by_brute_force():
    for how in GEOMETRIES:
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
    output = combine(sums, torch.tensor([10.0, 1.0, -1.0, 5.0]), torch.tensor(2.0))
    assert output.item() == 2 * (10 * 1 + 1 * 5 - 1 * 4)


def test_the_integer_path_is_the_fake_quantized_convolution():
    for how, scaled, zero_point in product(GEOMETRIES, (True, False), (0, 3)):
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
