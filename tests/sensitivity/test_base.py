import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.sensitivity.base import (
    Conditions,
    layer_weights,
    logits_with,
    plain_copy,
    weight_error,
)

CONDITIONS = Conditions((2,), [], AdqWeightQuantizer, LsqActivationQuantizer)


def test_the_weight_error_is_that_of_the_quantizer(small):
    quantizer = AdqWeightQuantizer(2)
    quantizer.calibrate(small.fc.weight.detach())
    expected = quantizer(small.fc.weight) - small.fc.weight
    error = weight_error(small, "fc", 2, CONDITIONS)
    assert torch.equal(error, expected.detach())
    assert error.abs().max() > 0.01


def test_damaged_weights_name_the_layer(small):
    small.fc.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"layer fc: the weights hold NaN .* check the float model"):
        weight_error(small, "fc", 2, CONDITIONS)


def test_logits_are_those_of_the_given_weights(small, batches):
    images = batches[0][0]
    weights = layer_weights(small.eval(), ["shared"])
    weights["shared"] *= 2
    logits = logits_with(small, weights, images)
    small.shared.weight.data *= 2
    assert torch.equal(logits, small(images))


def test_a_weight_of_two_layers_is_replaced_in_both_as_it_is_quantized_in_both():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    x, other = torch.randn(3, 2), torch.randn(2, 2)
    with torch.no_grad():
        assert torch.allclose(logits_with(net, {"0": other}, x), x @ other.T @ other.T)


def test_a_plain_copy_has_parameters_that_can_be_replaced():
    made = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3))
    x, weight = torch.randn(2, 4), torch.randn(5, 4)
    plain = plain_copy(made)
    assert torch.equal(plain(x), made(x))
    assert torch.equal(layer_weights(plain, ["0"])["0"], made[0].weight)
    expected = made[1](nn.functional.linear(x, weight, made[0].bias))
    torch.testing.assert_close(logits_with(plain, {"0": weight}, x), expected)
