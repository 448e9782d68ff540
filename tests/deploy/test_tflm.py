"""Packed weights in TensorFlow Lite Micro's own interpreter."""

import numpy as np
import pytest
import torch
from export_helpers import int8_network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adq_train.deploy.apart import FileHere
from adq_train.deploy.integer import IntegerLayer, integer_network
from adq_train.deploy.tflite import program_of
from adq_train.deploy.tflite_file import Value, file_bytes
from adq_train.deploy.tflm import DECODE, compressed, lookup, pack

SHAPE = (2, 8, 8)


@given(bits=st.integers(1, 7), numbers=st.lists(st.integers(0, 127), min_size=1, max_size=40))
def test_packed_numbers_are_a_string_of_bits(bits, numbers):
    numbers = np.array([x % 2**bits for x in numbers])
    digits = "".join(f"{x:0{bits}b}" for x in numbers)
    digits += "0" * (-len(digits) % 8)
    expected = [int(digits[i : i + 8], 2) for i in range(0, len(digits), 8)]
    assert pack(numbers, bits).tolist() == expected


def weight(levels, shape=(8, 3, 3, 16), axis=0):
    drawn = np.random.default_rng(0).choice(levels, shape)
    return Value("w", shape, "int8", np.ones(shape[axis], np.float32), 0, axis, drawn)


@pytest.mark.parametrize(("levels", "bits"), [((-127, 127), 1), ((-9, 0, 9), 2), (range(5), 3)])
@pytest.mark.parametrize("axis", [0, 3])
def test_a_table_for_each_channel(levels, bits, axis):
    value = weight(levels, axis=axis)
    indices, content = (x.data for x in lookup(value))
    channels = value.shape[axis]
    assert len(indices) == value.data.size * bits // 8
    assert content[:7].tolist() == [0, 1, 0, 0, 1, axis << 4 | bits, len(levels)]
    assert content[16:].view(np.int8).tolist() == sorted(levels) * channels


def test_what_would_not_be_smaller_stays():
    assert lookup(weight(range(-100, 100))) is None  # more than 7 bits
    assert lookup(weight(range(8), shape=(64, 1, 1, 16))) is None  # large tables


class Layers(nn.Module):
    """A convolution, a depthwise one and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 32, 3, bias=False), nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 5, groups=32)
        self.last = nn.Linear(128, 16)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.depthwise(x)).flatten(1))


@pytest.mark.parametrize(("bits", "packed_layers"), [(2, 3), (3, 2), (4, 1)])
def test_packed_weights_are_the_same_weights(bits, packed_layers, tmp_path):
    pytest.importorskip("tflite_micro")
    helpers = pytest.importorskip("tflite_helpers")
    network = integer_network(int8_network(Layers(), SHAPE, bits=bits, weights="n2uq"))
    # A scale for each channel: where one table was taken for several, outputs were wrong.
    layers = [x for x in network.modules() if isinstance(x, IntegerLayer)]
    assert any(len(x.scale.unique()) > 1 for x in layers)
    plain = program_of(network, torch.zeros(1, *SHAPE))
    packed = compressed(plain)
    assert [x.kind for x in packed.operations].count(DECODE) == packed_layers
    images, found, sizes = torch.randn(20, *SHAPE), {}, {}
    for name, program in {"plain": plain, "packed": packed}.items():
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(file_bytes(program, {}))
        found[name], sizes[name] = (
            FileHere(path, "TensorFlow Lite Micro")(images),
            path.stat().st_size,
        )
    assert torch.equal(found["packed"], found["plain"])
    assert sizes["packed"] < sizes["plain"]
    assert len(found["packed"].unique()) > 50
    content = (tmp_path / "plain.tflite").read_bytes()
    litert = helpers.run_file(content, images.permute(0, 2, 3, 1).numpy(), "reference")
    step = np.float32(packed.operations[-1].inputs[0].scale)
    assert np.abs(found["plain"].numpy() - litert).max() <= 1.01 * step  # of 16 bits
