import logging

import pytest
import torch
from torch import nn

from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError
from adq_train.quantization.describe import describe_layers, same_weight


class Reordered(nn.Module):
    """Runs its layers in another order than it holds them, and one of them never."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 10)
        self.unused = nn.Linear(3, 3)
        self.first = nn.Conv2d(1, 8, 3)

    def forward(self, x):
        return self.last(self.first(x).mean((2, 3)))


class Twice(nn.Module):
    """Applies one layer under two names, to inputs of two sizes."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(2, 2, 3)
        self.alias = self.shared

    def forward(self, x):
        return self.alias(self.shared(x))


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        pytest.param(nn.Conv2d(3, 8, 3, padding=1), (3, 6, 5), 8 * 6 * 5 * 27, id="plain"),
        pytest.param(nn.Conv2d(4, 8, 3, groups=2), (4, 6, 6), 8 * 4 * 4 * 18, id="grouped"),
        pytest.param(nn.Conv2d(6, 6, 3, groups=6), (6, 5, 5), 6 * 3 * 3 * 9, id="depthwise"),
        pytest.param(nn.Conv2d(2, 4, 3, stride=2), (2, 9, 7), 4 * 4 * 3 * 18, id="strided"),
        pytest.param(nn.Conv2d(2, 4, 3, dilation=2), (2, 9, 7), 4 * 5 * 3 * 18, id="dilated"),
        pytest.param(nn.Conv1d(3, 4, 5), (3, 9), 4 * 5 * 15, id="1d"),
        pytest.param(nn.Conv3d(1, 2, 2), (1, 3, 4, 5), 2 * 2 * 3 * 4 * 8, id="3d"),
        pytest.param(nn.ConvTranspose2d(3, 4, 2), (3, 5, 6), 3 * 5 * 6 * 16, id="transposed"),
        pytest.param(
            nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (4, 5, 6), 4 * 5 * 6 * 27, id="its groups"
        ),
        pytest.param(nn.Linear(7, 4), (7,), 28, id="linear"),
        pytest.param(nn.Linear(7, 4), (3, 7), 3 * 28, id="linear on a sequence"),
    ],
)
def test_costs_of_one_layer(layer, shape, macs):
    image = torch.zeros(1, *shape)
    (info,) = describe_layers(nn.Sequential(layer), image)
    assert info == LayerInfo("0", layer.weight.numel(), macs, image.numel())


def test_layers_come_in_the_order_of_execution(caplog):
    with caplog.at_level(logging.WARNING):
        layers = describe_layers(Reordered(), torch.zeros(1, 1, 4, 4))
    assert [x.name for x in layers] == ["first", "last"]
    (warning,) = caplog.messages
    assert "unused stays in full precision" in warning
    assert "never called" in warning


def test_a_shared_layer_counts_once_with_the_work_of_both_calls():
    (info,) = describe_layers(Twice(), torch.zeros(1, 2, 8, 8))
    macs = 2 * 6 * 6 * 18 + 2 * 4 * 4 * 18
    assert info == LayerInfo("shared", 36, macs, 2 * 8 * 8 + 2 * 6 * 6)


def test_a_model_without_layers_is_refused():
    with pytest.raises(UserError, match="no convolution or linear layer"):
        describe_layers(nn.Flatten(), torch.zeros(1, 2))


def test_a_subclass_is_left_alone(caplog):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    with caplog.at_level(logging.WARNING):
        layers = describe_layers(model, torch.zeros(1, 2))
    assert [x.name for x in layers] == ["0"]
    assert caplog.messages == ["1 stays in full precision: weights of a Own are not quantized"]


def test_layers_with_the_same_weight_count_as_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    layers = describe_layers(model, torch.zeros(1, 4))
    assert layers == (LayerInfo("0", 16, 32, 8), LayerInfo("1", 16, 16, 4))
    assert same_weight(model, "0") == ["0", "2"]
    assert same_weight(model, "2") == ["2", "0"]
    assert same_weight(model, "1") == ["1"]


class Attention(nn.Module):
    """Weights that nothing can intercept: used through functional calls, or of other kinds."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(5, 8))
        self.embed = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.functional = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.embed(x) * self.scale + self.position
        x, _ = self.attention(x, x, x)
        x, _ = self.recurrent(x)
        return nn.functional.linear(self.norm(x), self.functional.weight).mean(1)


def test_weights_that_cannot_be_quantized_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        layers = describe_layers(Attention(), torch.zeros(1, 5, 3))
    assert [x.name for x in layers] == ["embed"]
    named = [message.split(" stays in full precision: ") for message in caplog.messages]
    assert named == [
        ["the model's own weight", "weights of a Attention are not quantized"],
        ["attention", "weights of a MultiheadAttention are not quantized"],
        ["attention.out_proj", "weights of a NonDynamicallyQuantizableLinear are not quantized"],
        ["recurrent", "weights of a GRU are not quantized"],
        ["functional", "its forward() is never called"],
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten())
    model.train()
    model[1].eval()  # a frozen batch norm
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError):
            describe_layers(model, torch.zeros(1, 7, 5, 5))
    else:
        describe_layers(model, torch.randn(1, 1, 5, 5))
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
