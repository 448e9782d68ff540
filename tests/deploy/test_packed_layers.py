import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adq_train.deploy.layer_tables import Staircase, tables_of
from adq_train.deploy.packed_layers import Steps, compare_all, look_up, packed_layer
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.n2uq import N2uqActivationQuantizer, N2uqWeightQuantizer


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=255).map(sorted))
def test_comparing_with_each_threshold_counts_them(thresholds):
    thresholds = torch.tensor(thresholds, dtype=torch.float32)
    x = torch.arange(-22, 22, 0.5)
    expected = [sum(t < value for t in thresholds.tolist()) for value in x.tolist()]
    assert compare_all(x, thresholds).tolist() == expected


def test_lookup_takes_any_shape():
    table = torch.randn(5)
    indices = torch.randint(5, (2, 3, 4), dtype=torch.int32)
    assert torch.equal(look_up(table, indices), table[indices.long()])


@pytest.mark.parametrize("uniform", [True, False])
def test_steps_are_the_staircase(uniform):
    for bits in (2, 4, 5, 8):
        levels = torch.arange(2.0**bits) - 1 if uniform else torch.randn(2**bits).sort().values
        thresholds = torch.randn(2**bits - 1).sort().values
        x = torch.randn(2, 3, 4, 5)
        expected = levels[torch.bucketize(x, thresholds)]
        assert torch.equal(Steps(Staircase(bits, thresholds, levels))(x), expected)


@pytest.mark.parametrize("uniform", [True, False])
def test_steps_keep_the_layout(uniform):
    for bits in (3, 6):
        levels = torch.arange(2.0**bits) if uniform else torch.randn(2**bits).sort().values
        thresholds = torch.randn(2**bits - 1).sort().values
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        y = Steps(Staircase(bits, thresholds, levels))(x)
        assert y.is_contiguous(memory_format=torch.channels_last)


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 5, 4, 3)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 5, 6),
    ),
    "linear": (lambda: nn.Linear(4, 6), (2, 3, 4)),
}


@pytest.mark.parametrize("weights", [AdqWeightQuantizer, N2uqWeightQuantizer])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_answers_as_the_trained_one(kind, weights):
    for dense in (True, False):
        make, shape = LAYERS[kind]
        torch.manual_seed(0)
        layer, x = make(), torch.randn(shape)
        weight_quantizer, input_quantizer = weights(3), N2uqActivationQuantizer(2)
        weight_quantizer.calibrate(layer.weight.detach())
        input_quantizer.calibrate(x)
        trained = quantized(layer, weight_quantizer, input_quantizer)
        with torch.no_grad():
            expected = trained(x)
            packed = packed_layer(copy.deepcopy(layer), tables_of(kind, trained), dense)
            assert torch.equal(packed(x), expected)
