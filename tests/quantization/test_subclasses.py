"""Subclasses of layers: those whose own forward() is seen are quantized, the others named."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import adq_train
from adq_train.deploy.fold import foldable
from adq_train.deploy.model import assemble, tables_of_network
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.full_precision import Strictness
from adq_train.quantization.layers import QuantSubclass, float_form, quantized
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.prepare import quantized_layers
from adq_train.quantization.subclasses import refusal


class Plain(nn.Linear):
    """Its forward is the base's."""


class Scaled(nn.Linear):
    """Calls the base's with something of its own."""

    def forward(self, input, gain=1.0):
        return super().forward(input) * gain


class Same(nn.Conv2d):
    """Pads first, as TensorFlow does."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """Standardises its weight, which it reads twice, and has a gain that begins with zero."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.zeros(self.out_channels, 1, 1, 1))

    def standard(self, weight):
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return (1 + self.gain) * (weight - mean) / (std + 1e-5)

    def forward(self, x):
        assert self.weight.shape[0] == self.out_channels
        return F.conv2d(x, self.standard(self.weight), self.bias, self.stride, self.padding)


class Gated(Standardized):
    """With a gain of zero its output does not tell what its weight is."""

    def standard(self, weight):
        return self.gain * weight


def makers(layer, x):
    """Calibrated quantizers for a layer."""
    weight_quantizer, input_quantizer = AdqWeightQuantizer(3), N2uqActivationQuantizer(4)
    weight_quantizer.calibrate(layer.weight.detach())
    input_quantizer.calibrate(x)
    return weight_quantizer, input_quantizer


X = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
ACCEPTED = {
    "plain": (lambda: Plain(7, 3), lambda layer, x, w: F.linear(x, w, layer.bias)),
    "scaled": (lambda: Scaled(7, 3, bias=False), lambda layer, x, w: F.linear(x, w)),
    "same": (
        lambda: Same(4, 8, 2, stride=2),
        lambda layer, x, w: F.conv2d(F.pad(x, (0, 1, 0, 1)), w, layer.bias, 2),
    ),
    "standardized": (
        lambda: Standardized(4, 8, 3),
        lambda layer, x, w: F.conv2d(x, layer.standard(w), layer.bias),
    ),
    "gated": (lambda: Gated(4, 8, 3), lambda layer, x, w: F.conv2d(x, 0 * w, layer.bias)),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_its_own_forward_meets_quantized_tensors(kind):
    make, compute = ACCEPTED[kind]
    layer = make()
    assert refusal(layer, X) is None
    weights, inputs = makers(layer, X)
    form = quantized(layer, weights, inputs)
    assert isinstance(form, (QuantSubclass, type(layer)))
    expected = compute(layer, inputs(X), weights(layer.weight))
    torch.testing.assert_close(form(X), expected)
    # Nothing is left behind, and everything is shared.
    assert form.weight is layer.weight
    assert form.bias is layer.bias
    assert dict(layer.named_children()) == {}
    nothing = nn.Identity()
    assert torch.equal(quantized(layer, nothing, nothing)(X), layer(X))
    assert torch.equal(float_form(form)(X), layer(X))
    assert type(float_form(form)) is type(layer)
    assert type(copy.deepcopy(form)) is type(form)


def test_further_arguments_are_handed_on():
    layer = Scaled(7, 3)
    form = quantized(layer, *makers(layer, X))
    assert torch.equal(form(X, 2.0), form(X, gain=2.0))
    assert torch.equal(form(X, 2.0), 2 * form(X))
    assert refusal(layer, X, (2.0,)) is None
    assert refusal(layer, X, named={"input": X, "gain": 2.0}) is None


def test_gradients_reach_weight_gain_and_thresholds():
    layer = Standardized(4, 8, 3)
    form = quantized(layer, *makers(layer, X))
    form(X).square().sum().backward()
    for tensor in (layer.weight, layer.gain, layer.bias):
        assert (tensor.grad != 0).any()
    assert any((x.grad != 0).any() for x in form.input_quantizer.parameters() if x.grad is not None)


def test_a_failure_leaves_the_weight_in_place():
    layer = Same(4, 8, 2)
    form = quantized(layer, *makers(layer, X))
    with pytest.raises(RuntimeError):
        form(X[:, :3])
    assert form.weight is layer.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_compute_in_float32_and_keep_their_own(dtype):
    layer = Same(4, 8, 2).to(dtype)
    assert refusal(layer, X.to(dtype)) is None
    weights, inputs = makers(layer.float(), X)
    expected = quantized(layer, weights, inputs)(X.to(dtype).float()).to(dtype)
    assert torch.equal(quantized(layer.to(dtype), weights, inputs)(X.to(dtype)), expected)


class Cached(Plain):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.cache = [self.weight]

    def forward(self, x):
        return F.linear(x, self.cache[0], self.bias)


class Reading(Plain):
    def forward(self, x):
        return F.linear(x, dict(self.named_parameters())["weight"], self.bias)


class Blind(Plain):
    def forward(self, x):
        return self.bias.expand(*x.shape[:-1], -1) + self.weight.sum()


class Random(Plain):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


class Fixed(Plain):
    """Its weight is made of another tensor by a property."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.source = nn.Parameter(self._parameters.pop("weight").detach() / 2)

    @property
    def weight(self):
        if "source" not in self._parameters:
            raise AttributeError("weight")
        return 2 * self.source


REFUSED = {
    Cached: "does not look at its weight",
    Blind: "does not look at its input",
    Random: "gives other values between quantizers",
    Fixed: "fails between quantizers (its weight is none of its parameters)",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_forward_that_is_not_seen_is_refused(kind):
    layer = kind(7, 3)
    assert refusal(layer, X) == f"the forward() of {kind.__name__} {REFUSED[kind]}"
    assert refusal(layer, torch.zeros_like(X)) == refusal(layer, X)  # whatever the example is


def test_a_forward_that_finds_its_weight_elsewhere_in_the_layer_is_seen():
    layer = Reading(7, 3)
    assert refusal(layer, X) is None


class Net(nn.Module):
    def __init__(self, odd=Plain):
        super().__init__()
        self.same, self.norm = Same(1, 6, 2), nn.BatchNorm2d(6)
        self.standard = Standardized(6, 6, 3)
        self.odd = odd(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.standard(self.norm(self.same(x)).relu())
        return self.head(self.odd(x.mean((2, 3))).relu())


IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_network_lists_those_that_it_can_quantize(caplog):
    model = Net(Cached)
    assert [x.name for x in describe_layers(model, IMAGES[:1])] == ["same", "standard", "head"]
    reason = "the forward() of Cached does not look at its weight"
    assert caplog.messages == [f"odd stays in full precision: {reason}"]
    with pytest.raises(UserError, match=r"strict: odd stays in full .*; list .* bits\.full_prec"):
        describe_layers(model, IMAGES[:1], strictness=Strictness(True))
    caplog.clear()
    assert len(describe_layers(model, IMAGES[:1], strictness=Strictness(True, ["od*"]))) == 3
    assert not caplog.messages
    with pytest.raises(UserError, match="strict: odd stays"):
        adq_train.quantize(model, [IMAGES], strict=True)


def test_a_weight_that_is_shared_with_a_refused_layer_stays_float(caplog):
    model = Net(Blind)
    model.extra = nn.Linear(6, 6)
    model.extra.weight = model.odd.weight
    model.head = nn.Sequential(model.extra, nn.Linear(6, 4))
    names = [x.name for x in describe_layers(model, IMAGES[:1])]
    assert names == ["same", "standard", "head.1"]
    assert any(x.startswith("odd stays in full precision") for x in caplog.messages)


def test_a_parametrized_subclass_stays_float(caplog):
    model = Net()
    parametrizations.weight_norm(model.odd)
    assert "odd" not in [x.name for x in describe_layers(model, IMAGES[:1])]
    assert caplog.messages[0].startswith("odd.parametrizations.weight.original1 stays")


@pytest.fixture(scope="module")
def trained():
    """A few steps from quantize() on."""
    torch.manual_seed(0)
    model = adq_train.quantize(Net(), [IMAGES], average_bits=3.0)
    optimizer = torch.optim.SGD(adq_train.parameter_groups(model, lr=0.1, weight_decay=0.0))
    adq_train.follow(model, optimizer)
    for _ in range(3):
        model(IMAGES).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_it_is_trained_saved_loaded_and_exported(trained, tmp_path):
    assert list(quantized_layers(trained)) == ["same", "standard", "odd", "head"]
    assert (trained.standard.gain != 0).any()
    path = tmp_path / "model.safetensors"
    adq_train.save(trained, path)
    expected = trained(IMAGES)
    assert torch.equal(adq_train.load(path, Net)(IMAGES), expected)
    adq_train.export(trained, path, IMAGES)
    for unpacked in (True, False):
        packed = adq_train.load_packed(path, unpacked, network=Net)
        assert torch.equal(packed(IMAGES), expected)
    assert "standard.layer.weight" not in packed.state_dict()
    pytest.importorskip("onnxruntime")
    agreement = adq_train.export(trained, tmp_path / "model.onnx", IMAGES)
    assert agreement.largest_difference < 1e-5


def test_no_batch_norm_is_folded_into_a_subclass(trained):
    """Its forward() may do anything with what it is given."""
    tables = tables_of_network(copy.deepcopy(trained))
    assert "standard.gain" in tables.floats
    assert foldable(assemble(tables, network=Net())) == {}


def test_profiling_reuses_what_lies_before_a_subclass(trained):
    """The listed operations give the numbers that whole runs give."""
    from adq_train.sensitivity.perturbation import Perturbation

    tables = [
        adq_train.quantize(Net().eval(), [IMAGES], sensitivity=Perturbation(kept_bytes=kept))
        for kept in (0, 10**9)
        if torch.manual_seed(0)
    ]
    first, second = (x.adq.table.layers for x in tables)
    assert first == second
