import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer, LsqWeightQuantizer
from adq_train.quantization.mixture import (
    Choice,
    LayerChoice,
    Mixture,
    mix_layer,
)
from adq_train.quantization.pact import PactActivationQuantizer
from adq_train.quantization.prepare import swap, weight_quantizers

CPU = torch.device("cpu")
WIDTHS = (2, 3, 4)


def choice(*logits, widths=WIDTHS):
    return Choice(widths, torch.tensor(logits, requires_grad=True))


def calibrated(make, values, widths=WIDTHS):
    quantizers = [make(bits) for bits in widths]
    for quantizer in quantizers:
        quantizer.calibrate(values)
    return quantizers


def test_shares_are_the_softmax_and_surprise_is_minus_its_logarithm():
    some = choice(0.0, 1.0, -2.0)
    weights = torch.tensor([0.0, 1.0, -2.0]).exp()
    shares = weights / weights.sum()
    torch.testing.assert_close(some.shares(), shares)
    assert some.surprise() == pytest.approx(
        dict(zip(WIDTHS, (-shares.log()).tolist(), strict=True))
    )
    assert Choice.among(WIDTHS, CPU).shares().tolist() == pytest.approx([1 / 3] * 3)
    # A share that rounds to 1 has the surprise 0, and one that rounds to 0 a finite one.
    assert choice(800.0, 0.0, 0.0).surprise() == pytest.approx({2: 0.0, 3: 800.0, 4: 800.0})


def test_options_of_choices_apart_are_independent_and_in_the_order_of_the_products():
    first, second = choice(0.3, -1.0, widths=(2, 4)), choice(2.0, 0.5, widths=(2, 4))
    shares = LayerChoice(first, second).option_shares()
    expected = [a * b for a in first.shares().tolist() for b in second.shares().tolist()]
    assert shares.tolist() == pytest.approx(expected)
    assert shares.sum().item() == pytest.approx(1)
    assert LayerChoice(first, first).option_shares().tolist() == first.shares().tolist()


def test_a_mixed_layer_computes_the_sum_written_by_hand():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(2, 3, 3)), torch.randn(4, 2, 6, 6)
    both = LayerChoice(choice(0.5, -0.2, 1.0), choice(-1.0, 0.0, 2.0))
    make = AdqWeightQuantizer, LsqActivationQuantizer
    forms = mix_layer(net, "0", both, *make, {"0": x}, 0)
    weight = sum(
        share * q(net[0].weight)
        for share, q in zip(
            both.weights.shares(), calibrated(make[0], net[0].weight.detach()), strict=True
        )
    )
    inputs = sum(
        share * q(x) for share, q in zip(both.inputs.shares(), calibrated(make[1], x), strict=True)
    )
    torch.testing.assert_close(forms["0"](x), F.conv2d(inputs, weight, net[0].bias))


def test_the_gradient_of_the_logits_is_that_of_finite_differences():
    """In one layer all is smooth in the shares; a second one would quantize what they change."""
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(6, 4)), torch.randn(32, 6), torch.randint(4, (32,))
    both = LayerChoice(choice(0.5, -0.2, 1.0), choice(-1.0, 0.0, 0.7))
    swap(net, mix_layer(net, "0", both, LsqWeightQuantizer, LsqActivationQuantizer, {"0": x}, 0))

    def loss():
        return F.cross_entropy(net(x).double(), y)

    loss().backward()
    for logits in (both.weights.logits, both.inputs.logits):
        for index in range(len(WIDTHS)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    logits[index] += sign * 0.01
                    values.append(float(loss()))
                    logits[index] -= sign * 0.01
            slope = (values[0] - values[1]) / 0.02
            assert abs(slope) > 1e-4
            assert logits.grad[index].item() == pytest.approx(slope, rel=0.02, abs=2e-5)


class Times(nn.Module):
    """In a quantizer's place: a factor, whose gradient is known."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_the_gradient_of_a_mixture_is_exact_in_float64():
    torch.manual_seed(0)
    factors = torch.randn(3, dtype=torch.float64).tolist()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def output(x, logits):
        of = SimpleNamespace(shares=lambda: logits.softmax(0))
        return Mixture([Times(factor) for factor in factors], of)(x)

    assert torch.autograd.gradcheck(output, (x, logits))


def test_each_codebook_follows_the_weight_as_it_would_alone():
    torch.manual_seed(0)
    weight = torch.randn(8, 5)
    mixture = Mixture(calibrated(AdqWeightQuantizer, weight), choice(0.0, 1.0, 2.0))
    alone = copy.deepcopy(mixture.quantizers)
    moved = weight + 0.5
    mixture.adapt(moved)
    for quantizer, other in zip(mixture.quantizers, alone, strict=True):
        before = other.levels().clone()
        other.adapt(moved)
        assert torch.equal(quantizer.levels(), other.levels())
        assert not torch.equal(before, other.levels())


def test_input_quantizers_regularize_themselves():
    x = torch.rand(50)

    def make(bits):
        return PactActivationQuantizer(bits, decay=0.1)

    mixture = Mixture(calibrated(make, x), choice(0.0, 0.0, 0.0))
    mixture(x).sum().backward()
    alone = copy.deepcopy(mixture.quantizers)
    for quantizer, other in zip(mixture.quantizers, alone, strict=True):
        for mine, its in zip(quantizer.parameters(), other.parameters(), strict=True):
            its.grad = mine.grad.clone()
    mixture.regularize()
    for quantizer, other in zip(mixture.quantizers, alone, strict=True):
        before = [p.grad.clone() for p in other.parameters()]
        other.regularize()
        after = [p.grad for p in other.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for mine, its in zip(quantizer.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine.grad, its.grad)


def test_logits_are_no_parameters_and_a_shared_weight_has_one_mixture():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    x = torch.randn(20, 3)
    some = choice(0.0, 0.0, 0.0)
    make = AdqWeightQuantizer, LsqActivationQuantizer
    forms = mix_layer(net, "0", LayerChoice(some, some), *make, {"0": x, "2": x + 1}, 0)
    assert list(forms) == ["0", "2"]
    assert forms["0"].weight_quantizer is forms["2"].weight_quantizer
    assert forms["0"].input_quantizer is not forms["2"].input_quantizer
    swap(net, forms)
    assert list(weight_quantizers(net)) == [forms["0"].weight_quantizer]
    assert all(p is not some.logits for p in net.parameters())
    net(x).sum().backward()
    assert some.logits.grad is not None
