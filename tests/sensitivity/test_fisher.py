import copy
import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.fisher import Fisher, squared_gradients

BIT_WIDTHS = (2, 4)


class Branching(nn.Module):
    """Looks at its values, which vmap cannot follow."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else -self.net(x)


def measure(model, layers, batches, **options):
    conditions = Conditions(BIT_WIDTHS, batches, AdqWeightQuantizer, LsqActivationQuantizer)
    rows = Fisher(**options).measure(model, layers, conditions)
    return {row.name: row for row in rows}


def by_hand(model, name, bits, batches):
    """Σ_i (g_i ΔW_i)² of each image, from one backward pass per image: mean and standard error."""
    net = copy.deepcopy(model).eval()
    weight = net.get_submodule(name).weight
    quantizer = AdqWeightQuantizer(bits)
    quantizer.calibrate(weight.detach())
    error = (quantizer(weight) - weight).detach().double()
    found = []
    for images, targets in batches:
        for i in range(len(images)):
            net.zero_grad()
            F.cross_entropy(net(images[i : i + 1]), targets[i : i + 1]).backward()
            found.append(float((weight.grad.double() * error).square().sum()))
    return statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5


@pytest.mark.parametrize("chunk_size", [1, 3, 16])
def test_it_is_that_of_a_loop_over_images(small, layers, batches, chunk_size):
    rows = measure(small, layers, batches, chunk_size=chunk_size)
    assert [(x.name, x.num_weights, x.macs) for x in rows.values()] == [
        (x.name, x.num_weights, x.macs) for x in layers
    ]
    for name, row in rows.items():
        for bits in BIT_WIDTHS:
            expected, error = by_hand(small, name, bits, batches)
            assert expected > 1e-6
            assert row.sensitivity[bits] == pytest.approx(expected, rel=1e-4)
            assert row.standard_error[bits] == pytest.approx(error, rel=1e-4)


def test_a_network_that_vmap_cannot_follow_is_measured_image_by_image(small, layers, batches):
    net = Branching(small)
    layers = [type(x)(f"net.{x.name}", x.num_weights, x.macs, x.num_inputs) for x in layers]
    with pytest.raises(RuntimeError):
        torch.vmap(net)(batches[0][0][:, None])
    for name, row in measure(net, layers, batches).items():
        expected, _ = by_hand(net, name, 2, batches)
        assert row.sensitivity[2] == pytest.approx(expected, rel=1e-4)


def test_one_image_has_no_standard_error(small, layers, batches):
    for row in measure(small, layers, [tuple(x[:1] for x in batches[0])]).values():
        assert row.standard_error is None


def test_logistic_regression_has_its_closed_form():
    """g = (p - y) xᵀ, so g_ij² = (p_i - y_i)² x_j²."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3))
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    residual = (net(x).softmax(1) - F.one_hot(y, 3)).detach()
    expected = torch.einsum("ni,nj->nij", residual**2, x**2)
    squares = squared_gradients(net.requires_grad_(False), ["0"], x, y)
    assert torch.allclose(squares["0"], expected, rtol=1e-5)


def test_the_model_is_left_as_it_was(small, layers, batches):
    state = {name: value.clone() for name, value in small.state_dict().items()}
    measure(small, layers, batches)
    assert all(module.training for module in small.modules())
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        Fisher(0)


def test_the_name_is_the_one_in_the_table():
    assert Fisher().name == "fisher"
