import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose2d,
    QuantLinear,
    quantized,
)
from adq_train.quantization.n2uq import N2uqActivationQuantizer


def quantize(layer, x):
    """The quantized form of a layer, calibrated on its weight and on ``x``."""
    weight_quantizer, input_quantizer = AdqWeightQuantizer(3), N2uqActivationQuantizer(4)
    weight_quantizer.calibrate(layer.weight.detach())
    input_quantizer.calibrate(x)
    return quantized(layer, weight_quantizer, input_quantizer)


CONVOLUTIONS = [
    (nn.Conv1d, QuantConv1d, F.conv1d, (7,), {"stride": 2, "padding": 1}),
    (nn.Conv1d, QuantConv1d, F.conv1d, (7,), {"bias": False}),
    (nn.Conv2d, QuantConv2d, F.conv2d, (7, 6), {"groups": 2, "dilation": 2, "padding": (2, 1)}),
    (nn.Conv2d, QuantConv2d, F.conv2d, (7, 6), {"stride": (2, 1), "groups": 4, "bias": False}),
    (nn.Conv2d, QuantConv2d, F.conv2d, (7, 6), {"padding": "same"}),
    (nn.Conv3d, QuantConv3d, F.conv3d, (5, 4, 6), {"stride": 2, "padding": 1, "dilation": 2}),
]


@pytest.mark.parametrize(
    ("make", "kind", "convolve", "size", "options"),
    CONVOLUTIONS,
    ids=[f"{make.__name__} {options}" for make, *_, options in CONVOLUTIONS],
)
def test_convolutions_work_on_quantized_tensors(make, kind, convolve, size, options):
    x = torch.randn(2, 4, *size)
    layer = make(4, 8, 3, **options)
    quantized_layer = quantize(layer, x)
    assert type(quantized_layer) is kind
    weight = quantized_layer.weight_quantizer(layer.weight)
    x_quantized = quantized_layer.input_quantizer(x)
    assert not torch.equal(weight, layer.weight)
    assert not torch.equal(x_quantized, x)
    functional = {k: v for k, v in options.items() if k != "bias"}
    expected = convolve(x_quantized, weight, layer.bias, **functional)
    torch.testing.assert_close(quantized_layer(x), expected)


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"groups": 2, "stride": 2, "padding": 1, "output_padding": 1, "dilation": 2}],
    ids=str,
)
def test_a_transposed_convolution_works_on_quantized_tensors(options):
    x = torch.randn(2, 4, 5, 6)
    layer = nn.ConvTranspose2d(4, 6, 3, **options)
    quantized_layer = quantize(layer, x)
    assert type(quantized_layer) is QuantConvTranspose2d
    weight = quantized_layer.weight_quantizer(layer.weight)
    functional = {k: v for k, v in options.items() if k != "bias"}
    expected = F.conv_transpose2d(
        quantized_layer.input_quantizer(x), weight, layer.bias, **functional
    )
    torch.testing.assert_close(quantized_layer(x), expected)


def test_a_transposed_convolution_takes_an_output_size():
    x = torch.randn(2, 4, 5, 6)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2)
    assert quantize(layer, x)(x, output_size=[12, 13]).shape == layer(x, [12, 13]).shape


def test_hooks_and_attributes_come_along_and_the_float_layer_keeps_its_own():
    layer, calls = nn.Linear(4, 3), []
    layer.label = "mine"
    layer.register_forward_hook(lambda *_: calls.append(1))
    quantized_layer = quantize(layer, torch.randn(8))
    quantized_layer(torch.randn(2, 4))
    assert quantized_layer.label == "mine"
    assert calls == [1]
    assert dict(layer.named_children()) == {}
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_pad_the_quantized_input(mode):
    x = torch.randn(2, 4, 7, 6)
    layer = nn.Conv2d(4, 8, 3, padding=(2, 1), padding_mode=mode)
    quantized_layer = quantize(layer, x)
    padded = F.pad(quantized_layer.input_quantizer(x), (1, 1, 2, 2), mode=mode)
    expected = F.conv2d(padded, quantized_layer.weight_quantizer(layer.weight), layer.bias)
    torch.testing.assert_close(quantized_layer(x), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5)])
def test_linear_works_on_quantized_tensors(shape, bias):
    x = torch.randn(shape)
    layer = nn.Linear(5, 7, bias=bias)
    quantized_layer = quantize(layer, x)
    assert type(quantized_layer) is QuantLinear
    weight = quantized_layer.weight_quantizer(layer.weight)
    expected = quantized_layer.input_quantizer(x) @ weight.T
    torch.testing.assert_close(quantized_layer(x), expected + layer.bias if bias else expected)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(4, 3, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_parameters_are_shared_and_the_mode_is_kept(make, training):
    layer = make().train(training)
    quantized_layer = quantize(layer, torch.randn(8))
    assert quantized_layer.weight is layer.weight
    assert quantized_layer.bias is layer.bias
    assert quantized_layer.training is training
    assert {p.device.type for p in quantized_layer.parameters()} == {"cpu"}


def test_gradients_reach_weight_bias_input_and_thresholds():
    x = torch.randn(6, 4, 5, 5, requires_grad=True)
    layer = nn.Conv2d(4, 3, 3)
    quantize(layer, x.detach())(x).square().sum().backward()
    assert (layer.weight.grad != 0).all()
    assert (layer.bias.grad != 0).all()
    assert (x.grad != 0).any()


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: nn.Conv1d(4, 3, 1)])
def test_state_dict_round_trip(make):
    x = torch.randn(4, 4)
    source, target = (quantize(make(), scale * x) for scale in (1, 3))
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(2, 2, 3), nn.BatchNorm1d(2)], ids=repr)
def test_other_layers_are_refused(layer):
    with pytest.raises(TypeError, match=f"cannot quantize a {type(layer).__name__}"):
        quantized(layer, AdqWeightQuantizer(3), N2uqActivationQuantizer(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_autocast_leaves_levels_of_8_bits_apart(bits, dtype, monkeypatch):
    """What the product computes with, of 256 inputs that lie all over the range."""
    arrived = []

    def linear(x, weight, bias):
        rounded = dtype if torch.is_autocast_enabled("cpu") else x.dtype
        arrived.extend([x.detach().to(rounded), weight.detach().to(rounded)])
        return product(x, weight, bias)

    product = F.linear
    monkeypatch.setattr("adq_train.quantization.layers.F.linear", linear)
    torch.manual_seed(0)
    inputs, weights = N2uqActivationQuantizer(bits), AdqWeightQuantizer(bits)
    layer = nn.Linear(256, 8)
    weights.calibrate(layer.weight.detach())
    inputs.calibrate(torch.rand(5000) * 1.01)
    x = torch.linspace(0, 1.01, 256).view(1, -1).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = quantized(layer, weights, inputs)(x)
    assert [len(t.unique()) for t in arrived] == [
        2**bits, len(weights.quantize(layer.weight).unique())
    ]  # fmt: skip
    if bits == 8:  # so rounding would show
        assert len(inputs.levels().to(torch.bfloat16).unique()) < 2**bits
        expected = product(*arrived, layer.bias).to(dtype)
        assert torch.equal(y, expected)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_layer_prints_as_one_line_with_its_bits():
    layer = quantized(nn.Linear(4, 2), AdqWeightQuantizer(3), N2uqActivationQuantizer(4))
    assert repr(layer) == (
        "QuantLinear(in_features=4, out_features=2, bias=True, "
        "weight=AdqWeightQuantizer(bit_width=3), input=N2uqActivationQuantizer(bit_width=4))"
    )
    layer.inner = nn.ReLU()  # a layer with more within shows all of it
    assert "(inner): ReLU()" in repr(layer)
    assert "(weight_quantizer): AdqWeightQuantizer(bit_width=3)" in repr(layer)
