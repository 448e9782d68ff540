"""Weights that are made anew in every forward pass, in every form that PyTorch has for them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.copies import copied
from adq_train.quantization.layer_weights import kept_weight, used_weight
from adq_train.quantization.layers import QuantLinear, quantized
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.quantization.prepare import Upkeep, keep_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean()


def centred(layer, name="weight"):
    parametrize.register_parametrization(layer, name, Centred())
    return layer


FORMS = {
    "weight norm, hook": weight_norm,
    "spectral norm, hook": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.random_unstructured(
        prune.ln_structured(layer, "weight", 0.3, 2, 0), "weight", 0.2
    ),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "custom": centred,
    "two": lambda layer: centred(parametrizations.weight_norm(layer)),
}


def moved(layer):
    """Gives all parameters of a layer other values, as an optimizer step does."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("form", FORMS)
def test_the_used_weight_is_that_of_the_next_evaluation(form):
    layer, x = FORMS[form](nn.Linear(6, 8)), torch.randn(3, 6)
    layer(x).sum().backward()
    moved(layer)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        weight = used_weight(layer).clone()
    assert layer.training
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert kept_weight(layer) is None
    torch.testing.assert_close(layer.eval()(x), F.linear(x, weight, layer.bias))


def test_a_plain_weight_is_itself():
    layer = nn.Linear(2, 2)
    assert used_weight(layer) is layer.weight
    assert used_weight(layer.double()).dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_quantizers_follow_what_the_weight_is_made_from(form):
    layer, x = FORMS[form](nn.Linear(6, 8)), torch.randn(3, 6)
    quantizer = AdqWeightQuantizer(3, decay=0.5)
    with torch.no_grad():
        quantizer.calibrate(used_weight(layer))
    inputs = LsqActivationQuantizer(4)
    inputs.calibrate(x)
    model = nn.Sequential(quantized(layer, quantizer, inputs)).eval()
    assert isinstance(model[0], QuantLinear)
    assert model.state_dict().keys() > {f"0.{name}" for name in layer.state_dict()}
    upkeep = Upkeep(model)
    model(x).square().sum().backward()
    assert all(p.grad.any() for n, p in model[0].named_parameters() if "weight" in n)

    moved(model[0])
    twin, levels = copy.deepcopy(quantizer), quantizer.levels().clone()
    with torch.no_grad():
        twin.adapt(used_weight(model[0]))
    upkeep.after_step()
    assert torch.equal(quantizer.levels(), twin.levels())
    assert not torch.equal(quantizer.levels(), levels)


@pytest.mark.parametrize("form", FORMS)
def test_settled_layers_compute_the_same_with_parameters(form):
    model = nn.Sequential(centred(FORMS[form](nn.Linear(6, 8)), "bias"), nn.ReLU()).eval()
    x = torch.randn(3, 6)
    settled = copied(model)
    keep_weights(settled)
    assert type(settled[0]) is nn.Linear
    assert isinstance(settled[0].weight, nn.Parameter)
    assert not settled[0]._forward_pre_hooks
    assert torch.equal(settled(x), model(x))
    moved(model[0])  # the original's class is not the copy's to change
    assert not torch.equal(settled(x), model(x))


def test_a_weight_that_is_set_from_outside_is_refused():
    layer = nn.Linear(2, 2)
    del layer.weight
    layer.weight = torch.ones(2, 2)
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    with pytest.raises(UserError, match="something else sets; make it a parameter"):
        used_weight(layer)
