import copy
from functools import partial

import pytest
import torch
from torch import nn

from adq_train.artifacts import BitAllocation, LayerBits
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.layers import QuantConv2d, QuantLinear
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.quantization.prepare import (
    collect_inputs,
    prepare,
    quantized_layers,
    replaced,
    weight_quantizers,
)

NAMES = ("0", "3.0", "5")


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3)),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


@pytest.fixture
def images():
    return torch.randn(8, 1, 6, 6)


def allocation(bits):
    """Bits by layer name; the costs do not matter here."""
    layers = tuple(LayerBits(name, *pair) for name, pair in bits.items())
    return BitAllocation("fixed", {}, layers, 3.0, 3.0, 3.0, 1, 1, 0.0, False)


def prepared(model, bits, inputs, make_weight_quantizer=AdqWeightQuantizer, seed=0):
    quantized = copy.deepcopy(model)
    prepare(
        quantized, allocation(bits), make_weight_quantizer, LsqActivationQuantizer, inputs, seed
    )
    return quantized


def test_every_allocated_layer_is_replaced_and_initialised(model, images):
    inputs = collect_inputs(model, NAMES, [images], seed=0)
    bits = {"0": (8, 7), "3.0": (2, 3), "5": (4, 4)}
    quantized = prepared(model, bits, inputs)

    layers = quantized_layers(quantized)
    assert [type(layer) for layer in layers.values()] == [QuantConv2d, QuantConv2d, QuantLinear]
    for name, (weight_bits, activation_bits) in bits.items():
        layer, weight = layers[name], model.get_submodule(name).weight
        expected_weight = AdqWeightQuantizer(weight_bits)
        expected_weight.calibrate(weight.detach())
        expected_input = LsqActivationQuantizer(activation_bits)
        expected_input.calibrate(inputs[name])
        assert torch.equal(layer.weight_quantizer.levels(), expected_weight.levels())
        assert torch.equal(layer.input_quantizer.levels(), expected_input.levels())
    assert not torch.equal(quantized(images), model(images))


def test_other_layers_stay(model, images):
    inputs = collect_inputs(model, ["3.0"], [images], seed=0)
    assert list(quantized_layers(prepared(model, {"3.0": (2, 2)}, inputs))) == ["3.0"]


def test_the_float_model_stays_as_it_was(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = collect_inputs(model, NAMES, [images], seed=0)
    prepared(model, dict.fromkeys(NAMES, (2, 2)), inputs)
    assert not quantized_layers(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_with_two_names_is_replaced_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.alias = self.shared

        def forward(self, x):
            return self.alias(self.shared(x))

    model, x = Twice(), torch.randn(5, 4)
    inputs = collect_inputs(model, ["shared"], [x], seed=0)
    quantized = prepared(model, {"shared": (3, 3)}, inputs)
    layer = quantized.shared
    assert isinstance(layer, QuantLinear)
    assert torch.equal(quantized(x), layer(layer(x)))


def test_layers_that_share_a_weight_share_its_quantizer():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(9, 4)
    model[2].weight = model[0].weight
    inputs = collect_inputs(model, ["0"], [x], seed=0)
    assert list(inputs) == ["0", "2"]
    quantized = prepared(model, {"0": (2, 3)}, inputs)
    first, second = quantized_layers(quantized).values()
    assert first.weight is second.weight
    assert first.weight_quantizer is second.weight_quantizer
    assert first.bias is not second.bias
    for layer, name in ((first, "0"), (second, "2")):
        expected = LsqActivationQuantizer(3)
        expected.calibrate(inputs[name])
        assert torch.equal(layer.input_quantizer.levels(), expected.levels())
    assert weight_quantizers(quantized) == {first.weight_quantizer: first}


def test_random_initialisation_depends_on_the_seed_and_the_layer():
    twins = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    twins[1].weight.data.copy_(twins[0].weight.data)
    inputs = collect_inputs(twins, ["0", "1"], [torch.randn(5, 16)], seed=0)
    make = partial(AdqWeightQuantizer, initialization="random")

    def codebooks(seed):
        quantized = prepared(twins, {"0": (4, 4), "1": (4, 4)}, inputs, make, seed)
        return [layer.weight_quantizer.levels() for layer in quantized]

    first, again, other = codebooks(1), codebooks(1), codebooks(2)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_an_unknown_layer_is_named(model):
    with pytest.raises(UserError, match=r"no layer 'layer9\.conv'"):
        prepared(model, {"layer9.conv": (2, 2)}, {})


@pytest.mark.parametrize("damage", ["weight", "input"])
def test_values_that_are_not_finite_name_the_layer(model, images, damage):
    inputs = collect_inputs(model, NAMES, [images], seed=0)
    if damage == "weight":
        model[3][0].weight.data[0, 0, 0, 0] = float("nan")
    else:
        inputs["3.0"][3] = float("inf")
    with pytest.raises(UserError, match=r"layer 3\.0: .*NaN"):
        prepared(model, dict.fromkeys(NAMES, (2, 2)), inputs)


def test_collected_inputs_are_what_the_layers_see(model, images):
    inputs = collect_inputs(model, NAMES, [images[:5], images[5:]], seed=0)
    hidden = model[2](model[1](model[0](images)))
    assert torch.equal(inputs["0"], images.flatten())
    torch.testing.assert_close(inputs["3.0"], hidden.detach().flatten())
    torch.testing.assert_close(inputs["5"], model[3](hidden).detach().flatten())


def test_large_inputs_are_sampled_with_the_seed(model, images):
    def collect(seed):
        return collect_inputs(model, ["0"], [images, images + 100], seed, values_per_batch=50)["0"]

    sample = collect(1)
    assert len(sample) == 100
    assert torch.isin(sample[:50], images).all()
    assert torch.isin(sample[50:], images + 100).all()
    assert torch.equal(sample, collect(1))
    assert not torch.equal(sample, collect(2))


def test_a_replaced_layer_comes_back_even_after_an_error(model, images):
    original, expected = model[3][0], model(images)

    def fail():
        with replaced(model, {"3.0": nn.Identity()}):
            assert isinstance(model[3][0], nn.Identity)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model[3][0] is original
    assert torch.equal(model(images), expected)
