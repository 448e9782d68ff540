"""What a user meets who asks for integers."""

import copy

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn

import adq_train
from adq_train.errors import ConfigError, UserError
from adq_train.quantization.edges import edge_quantizers
from adq_train.quantization.int8_grid import int8_step
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.pact import PactActivationQuantizer
from adq_train.quantization.prepare import quantized_layers
from adq_train.quantization.target import FLOAT, Int8Target, target_of
from adq_train.settings.schema import identity, register
from adq_train.settings.validate import validate


def composed(*overrides):
    register()
    with initialize_config_module("adq_train.configs", version_base="1.3"):
        return validate(compose("config", list(overrides)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(x + self.second(x)).mean((2, 3)))


IMAGES = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def test_float_is_no_part_of_a_run():
    """Folders and checkpoints of before there were targets stay what they are."""
    config, parts = composed("target=float")
    assert "target" not in identity(config.plain())
    assert type(parts.target) is type(FLOAT)
    assert composed()[0] == config


def test_int8_chooses_even_inputs_and_any_even_one_will_do():
    config, parts = composed("target=int8")
    assert config.activation_quantizer["_target_"].endswith("LsqActivationQuantizer")
    assert isinstance(parts.target, Int8Target)
    assert "target" in identity(config.plain())
    for inputs in ("pact", "dorefa"):
        composed("target=int8", f"activation_quantizer={inputs}")
    for inputs, kind in (("n2uq", "N2uq"), ("adq", "Adq"), ("apot", "Apot")):
        with pytest.raises(ConfigError) as refused:
            composed("target=int8", f"activation_quantizer={inputs}")
        (problem,) = refused.value.problems
        assert problem.startswith("activation_quantizer: target=int8 needs evenly spaced levels")
        assert f"{kind}ActivationQuantizer has others; choose lsq, pact or dorefa" in problem
    with pytest.raises(ConfigError, match=r"target._target_: .* is not a Target"):
        composed("target=int8", "target._target_=adq_train.allocation.ilp.IlpAllocator")


@pytest.mark.parametrize("inputs", [None, PactActivationQuantizer])
def test_a_network_of_ones_own_for_integers(tmp_path, inputs):
    torch.manual_seed(0)
    model = adq_train.quantize(
        Residual(), [IMAGES], average_bits=3, target="int8", make_activation_quantizer=inputs
    )
    assert len(edge_quantizers(model)) == 3
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        codes = quantizer(layer.weight) / int8_step(quantizer.levels())
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    optimizer = torch.optim.SGD(adq_train.parameter_groups(model, 0.05, 1e-4, 10.0))
    adq_train.follow(model, optimizer)
    before = [x.width().item() for x in edge_quantizers(model)]
    model.train()(IMAGES).square().mean().backward()
    optimizer.step()
    assert all(x.width().item() != y for x, y in zip(edge_quantizers(model), before, strict=True))
    adq_train.save(model.eval(), tmp_path / "model.safetensors")
    again = adq_train.load(tmp_path / "model.safetensors", Residual)
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert again.adq == model.adq
    assert again.adq.target == "int8"


def test_edges_stay_where_batches_go_in_in_a_way_of_their_own():
    torch.manual_seed(0)
    model = adq_train.quantize(
        Residual(), [{"picture": IMAGES}], average_bits=3, target="int8",
        forward=lambda net, batch: net(batch["picture"]),
    )  # fmt: skip
    assert isinstance(model, Residual)
    before = model.eval()(IMAGES)
    edge_quantizers(model)[0].log_step.data += 1
    assert not torch.equal(model(IMAGES), before)


@pytest.mark.parametrize(
    ("network", "batch", "settings"),
    [
        (Residual(), {"x": IMAGES}, {}),
        (Residual(), (IMAGES, torch.zeros(16).long()), {"loss": nn.CrossEntropyLoss()}),
        (torch.fx.symbolic_trace(Residual()), IMAGES, {}),
        (torch.fx.symbolic_trace(Residual()), {"x": IMAGES}, {}),
    ],
    ids=["named inputs", "loss", "GraphModule", "named inputs of a GraphModule"],
)
def test_edges_stay_whatever_the_network_is_called_with(network, batch, settings):
    model = adq_train.quantize(network, [batch], average_bits=3, target="int8", **settings)
    assert isinstance(model, Residual | torch.fx.GraphModule)
    before, other = model(IMAGES), copy.deepcopy(model)
    edge_quantizers(other)[0].log_step.data += 2
    assert not torch.equal(other(IMAGES), before)
    assert torch.equal(model(IMAGES), before)


def test_what_cannot_be_is_refused_before_anything_is_measured():
    class Gated(Residual):
        def forward(self, x):
            return self.head(torch.sigmoid(self.first(x)).mean((2, 3)))

    with pytest.raises(UserError, match=r"target: int8 does not know sigmoid \(node sigmoid\)"):
        adq_train.quantize(Gated(), [IMAGES], target="int8")
    with pytest.raises(UserError, match="make_activation_quantizer: target=int8 needs evenly"):
        adq_train.quantize(
            Residual(), [IMAGES], target="int8", make_activation_quantizer=N2uqActivationQuantizer
        )
    with pytest.raises(UserError, match="target: must be one of float, attention, int8, got"):
        target_of("int4")
