"""Integers against the network that was trained."""

import pytest
import torch
import torchvision
from export_helpers import SHAPE, int8_network, networks
from torch import nn

from adq_train.deploy.integer import (
    IntegerConv2d,
    IntegerLayer,
    IntegerLinear,
    Rescale,
    _in_range,
    integer_graph,
    integer_network,
)
from adq_train.errors import UserError
from adq_train.models import CifarResNet
from adq_train.quantization.prepare import quantized_layers


@pytest.fixture(scope="module")
def made():
    return {name: int8_network(x, SHAPE) for name, x in networks().items()}


@pytest.mark.parametrize("name", networks())
def test_integers_compute_what_was_trained(made, name, monkeypatch):
    """Up to rounding; that of biases is larger, the fewer weights a layer has."""
    network = made[name]
    images = torch.randn(500, *SHAPE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = network(images), integer_network(network)(images)
        monkeypatch.setattr("adq_train.deploy.integer._in_range", lambda *x: signed(*x))
        exact = integer_network(network)(images)
    reach = expected.abs().max()
    assert ((exact - expected).abs().amax(1) > 1e-4 * reach).float().mean() < 0.05
    assert (found - expected).abs().mean() < 0.05 * reach
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9


def signed(codes, scale, bias, input_step):
    """Positive scales, with biases as they are."""
    codes = codes * scale.sign().to(torch.int8).view(-1, *[1] * (codes.dim() - 1))
    return codes, scale.abs().float(), bias.float()


@pytest.mark.parametrize("name", networks())
def test_only_integers_are_left(made, name):
    integer = integer_network(made[name])
    layers = {k: x for k, x in integer.named_modules() if isinstance(x, IntegerLayer)}
    assert layers.keys() == quantized_layers(made[name]).keys()
    for layer in layers.values():
        assert layer.codes.dtype == torch.int8
        assert layer.codes.abs().max() <= 127
        assert (layer.scale > 0).all()
    steps = {k: x for k, x in integer.named_modules() if isinstance(x, Rescale)}
    for step in steps.values():
        assert step.high <= (255 if step.low >= 0 else 127)
        assert step.low >= -128
    others = [x for x in integer.modules() if next(x.parameters(recurse=False), None) is not None]
    assert all(isinstance(x, nn.BatchNorm2d) for x in others)
    assert bool(others) == (name == "preact")
    # What a layer gets comes from a Rescale, by what keeps integers integers.
    graph = integer_graph(integer)
    for node in graph:
        if isinstance(graph.operation(node).module, IntegerConv2d | IntegerLinear):
            source = node.args[0]
            while graph.operation(source).kind in ("max_pool", "flatten", "slice", "pad"):
                source = source.args[0]
            step = graph.operation(source).module
            assert isinstance(step, Rescale)
            layer = graph.operation(node).module
            if layer.bias is not None:
                counts = layer.bias.double() / (layer.scale.double() * step.step)
                torch.testing.assert_close(counts, counts.round(), rtol=1e-6, atol=0)


def test_a_rescale_stands_where_a_runtime_can_fuse_it(made):
    """At once behind its layer: no ReLU between them, no max pool."""
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(27, 4),
    )  # fmt: skip
    integer = integer_network(int8_network(network, SHAPE))
    assert [str(x.target).split(".")[-1] for x in integer.graph.nodes] == [
        "input", "0_input", "0", "5_input", "3", "4", "5", "output",
    ]  # fmt: skip
    kinds = [integer_graph(integer).operation(x).kind for x in integer_graph(integer)]
    assert kinds.count("relu") == 0


def test_torchvisions_networks_are_followed():
    torch.manual_seed(0)
    dense = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)
    mobile = torchvision.models.MobileNetV2(3, 0.25, [[1, 16, 1, 1], [6, 16, 2, 2]])
    wide = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 3)
    for network, expected in (
        (dense, {"cat": 6, "avg_pool": 1, "adaptive_avg_pool": 1, "relu": 0}),
        (mobile, {"add": 2, "relu6": 7, "batch_norm": 0}),
        (wide, {"add": 4, "relu": 0, "batch_norm": 0, "max_pool": 1}),
    ):
        integer = integer_network(int8_network(network, (3, 32, 32), weights="n2uq"))
        graph = integer_graph(integer)
        kinds = [graph.operation(x).kind for x in graph]
        assert {k: kinds.count(k) for k in expected} == expected
        with torch.no_grad():
            assert integer(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("inputs", ["pact", "dorefa"])
@pytest.mark.parametrize("weights", ["lsq", "n2uq", "apot"])
def test_other_methods(weights, inputs):
    network = int8_network(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)), SHAPE,
        weights=weights, inputs=inputs,
    )  # fmt: skip
    images = torch.randn(200, *SHAPE)
    with torch.no_grad():
        expected, found = network(images), integer_network(network)(images)
    assert (found - expected).abs().mean() < 0.02 * expected.abs().max()


def test_what_was_trained_for_float_is_refused_with_the_cure():
    network = int8_network(CifarResNet(8, 2, 3, 1), SHAPE, target="float")
    with pytest.raises(UserError, match=r"not one of target=int8: nothing quantizes .*; train it"):
        integer_network(network)
    chain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    with pytest.raises(UserError, match=r"weight levels of 0 are on no int8 grid; train it with"):
        integer_network(int8_network(chain, SHAPE, target="float"))
    with pytest.raises(UserError, match=r"the levels of 0's input .* are not evenly spaced"):
        integer_network(int8_network(chain, SHAPE, target="float", inputs="adq"))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), "0 pads with circular"),
        (nn.Conv2d(1, 3, 2, padding="same"), "0 pads with zeros, 'same'"),
        (nn.ConvTranspose2d(1, 3, 3), "0 is a ConvTranspose2d"),
    ],
)
def test_layers_that_are_not_there_are_named(layer, said):
    with pytest.raises(UserError, match=said):
        integer_network(int8_network(nn.Sequential(layer, nn.ReLU()), SHAPE))


def test_a_channel_that_is_switched_off_keeps_its_bias():
    codes = torch.tensor([[100], [-7], [3]], dtype=torch.int8)
    scale = torch.tensor([1e-14, -0.5, 0.0], dtype=torch.float64)
    bias = torch.tensor([2.0, 1.0, -3.0], dtype=torch.float64)
    found, carried, rounded = _in_range(codes, scale, bias, 0.1)
    assert (carried > 0).all()
    assert ((rounded / (carried * 0.1)).abs() <= 2**30 * 1.001).all()
    torch.testing.assert_close(rounded.double(), bias, rtol=0.05, atol=0)
    weights = found.double() * carried[:, None]
    torch.testing.assert_close(weights, codes * scale[:, None], rtol=1e-6, atol=1e-6)
