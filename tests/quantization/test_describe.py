import logging
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.layers import quantized, same_weight
from adq_train.quantization.prepare import collect_inputs, replaced


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
    assert [x.name for x in layers] == ["embed", "attention.in_proj", "attention.out_proj"]
    named = [re.split(" stays? in full precision: ", message) for message in caplog.messages]
    assert named == [
        ["position", "weights of a Attention are not quantized"],
        [
            "recurrent.weight_ih_l0, recurrent.weight_hh_l0",
            "weights of a GRU are not quantized",
        ],
        ["functional", "forward() is never called"],
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten())
    model.train()
    model[1].eval()  # a frozen batch norm
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(
            UserError, match=r"forward\(\) fails on an input of shape \(1, 7, 5, 5\)"
        ):
            describe_layers(model, torch.zeros(1, 7, 5, 5))
    else:
        describe_layers(model, torch.randn(1, 1, 5, 5))
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Encoder(nn.Module):
    """Torch's transformer encoder, which in evaluation would read its linear layers' weights."""

    def __init__(self, masked=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.masked = nn.TransformerEncoder(layer, 2), masked
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        ends = torch.arange(x.shape[1]).expand(x.shape[:2]) > 2
        return self.head(self.encoder(x, src_key_padding_mask=ends if self.masked else None)[:, 0])


@pytest.mark.parametrize("masked", [False, True])
def test_the_layers_of_a_fused_encoder_are_computed(masked):
    model, x = Encoder(masked).eval(), torch.randn(4, 5, 8)
    parts = "self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"
    names = [f"encoder.layers.{i}.{part}" for i in (0, 1) for part in parts] + ["head"]
    assert [layer.name for layer in describe_layers(model, x[:1])] == names
    inputs = collect_inputs(model, names, [x], seed=0)
    assert [len(inputs[name]) for name in names] == [*(160, 160, 160, 320) * 2, 32]
    changed = quantized(model.encoder.layers[1].linear2, Zero(), nn.Identity())
    with torch.no_grad(), replaced(model, {names[7]: changed}):
        model.eval()(x)
        assert changed.weight_quantizer.calls == 1


class Zero(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return torch.zeros_like(weight)


class Held(nn.Module):
    """Calls or reads a layer in some way that surgery may not reach."""

    def __init__(self, hold, use):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.held, self.use = hold(self), use

    def forward(self, x):
        return self.last(self.use(self, self.first(x)))


class Plain:
    """An object that is no module."""

    def __init__(self, layer):
        self.layer = layer


def held_call(model, x):
    return model.held(x)


ALIAS, UNREGISTERED = "layer layer is also called", r"weight of shape \(4, 4\) that is not among"
OUT_OF_REACH = {
    "a list": (lambda m: [nn.Linear(4, 4)], lambda m, x: m.held[0](x), UNREGISTERED),
    "a dict": (lambda m: {0: nn.Linear(4, 4)}, lambda m, x: m.held[0](x), UNREGISTERED),
    "an object": (lambda m: Plain(nn.Linear(4, 4)), lambda m, x: m.held.layer(x), UNREGISTERED),
    "a function": (lambda m: lambda x: m.layer(x), held_call, UNREGISTERED),
    "a weight": (
        lambda m: [nn.Parameter(torch.ones(4, 4))], lambda m, x: x @ m.held[0], UNREGISTERED,
    ),
    "another name in a list": (lambda m: [m.layer], lambda m, x: m.held[0](x), ALIAS),
    "both": (lambda m: [m.layer], lambda m, x: m.layer(m.held[0](x)), ALIAS),
    "another name in an object": (lambda m: Plain(m.layer), lambda m, x: m.held.layer(x), ALIAS),
    "a partial": (lambda m: partial(m.layer), held_call, ALIAS),
}  # fmt: skip


@pytest.mark.parametrize("kind", OUT_OF_REACH)
def test_a_layer_that_cannot_be_replaced_where_it_is_called_is_refused(kind):
    hold, use, message = OUT_OF_REACH[kind]
    with pytest.raises(UserError, match=message):
        describe_layers(Held(hold, use), torch.zeros(1, 4))


def functional(m, x):
    return nn.functional.linear(x, m.layer.weight)


READ_PAST = {
    "instead": (lambda m: None, functional, "layer stays .*: forward() is never called"),
    "its method": (lambda m: m.layer.forward, held_call, "layer stays .*: forward() is never"),
    "besides": (lambda m: None, lambda m, x: m.layer(functional(m, x)), "an operation of the mod"),
    "a view": (lambda m: None, lambda m, x: m.layer(x) @ m.layer.weight.data.T, "an operation"),
    "made anew": (
        lambda m: parametrizations.spectral_norm(m.layer),
        lambda m, x: m.layer(functional(m, x)),
        "an operation of the model stays",
    ),
}


@pytest.mark.parametrize("kind", READ_PAST)
def test_a_weight_that_is_read_past_its_layer_is_named(kind, caplog):
    hold, use, message = READ_PAST[kind]
    describe_layers(Held(hold, use), torch.zeros(1, 4))
    (warning,) = caplog.messages
    assert re.search(message.replace("()", r"\(\)"), warning)


def test_an_embedding_that_is_not_called_is_named(caplog):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.out = nn.Linear(4, 9, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.mid(self.embed.weight[x])).mean(1)

    layers = describe_layers(Tied(), torch.zeros(1, 3, dtype=torch.long))
    assert [x.name for x in layers] == ["mid", "out"]
    (warning,) = caplog.messages
    assert warning.endswith("it uses the weight of out without calling that layer")


def test_metadata_and_ordinary_use_are_not_reading_past(caplog):
    def use(m, x):
        return m.layer(input=x) * m.first.weight.shape[0]

    for hold in (lambda m: None, lambda m: parametrizations.weight_norm(m.layer)):
        assert len(describe_layers(Held(hold, use), torch.zeros(1, 4))) == 3
    assert not caplog.messages


def test_a_layer_whose_forward_was_replaced_stays_float(caplog):
    def hold(m):
        m.layer.forward = partial(nn.functional.linear, weight=m.layer.weight)

    layers = describe_layers(Held(hold, lambda m, x: m.layer(x)), torch.zeros(1, 4))
    assert [x.name for x in layers] == ["first", "last"]
    assert caplog.messages[-1].endswith("forward() is not that of the class")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x,), "its output is a tuple, not a tensor of logits"),
        (lambda x: {"logits": x}, "its output is a dict"),
        (lambda x: x.sum(), r"its output for 1 input\(s\) has shape \(\)"),
        (lambda x: x.argmax(1, keepdim=True), "torch.int64, not logits"),
        (lambda x: x.repeat(2, 1), r"has shape \(2, 2\)"),
    ],
)
def test_outputs_that_are_not_logits_are_refused(make, message):
    class Out(nn.Sequential):
        def forward(self, x):
            return make(super().forward(x))

    with pytest.raises(UserError, match=message):
        describe_layers(Out(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3))


def test_what_has_no_layers_to_replace_yet_is_refused():
    x = torch.zeros(1, 3)
    with pytest.raises(UserError, match="0 has no weights yet; run the network once"):
        describe_layers(nn.Sequential(nn.LazyLinear(4)), x)
    with pytest.raises(UserError, match="ScriptModule cannot be replaced"):
        describe_layers(torch.jit.script(nn.Sequential(nn.Linear(3, 4))), x)
