import logging
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_train.artifacts import LayerInfo
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.sensitivity.base import Conditions, layer_weights, weight_error
from adq_train.sensitivity.hessian import Hessian, curvatures, probe

CONDITIONS = Conditions((2, 4), [], AdqWeightQuantizer, LsqActivationQuantizer)


def measure(model, layers, batches, seed=0, **options):
    rows = Hessian(**options).measure(
        model, layers, replace(CONDITIONS, batches=batches, seed=seed)
    )
    return {row.name: row for row in rows}


@pytest.fixture
def regression():
    """Softmax regression and its images; the trace of its Hessian is known."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    x, y = torch.randn(30, 4), torch.randint(3, (30,))
    p = net(x).softmax(1).detach()
    trace = float(((p * (1 - p)).sum(1) * x.square().sum(1)).mean())
    return net, [(x[:20], y[:20]), (x[20:], y[20:])], trace


def test_probes_are_signs_that_depend_on_seed_layer_and_number():
    weights = {"a": torch.zeros(40, 50), "b": torch.zeros(40, 50)}
    first, again = probe(weights, 3, 0), probe(weights, 3, 0)
    assert torch.equal(first["a"], again["a"])
    assert set(first["a"].unique().tolist()) == {-1.0, 1.0}
    assert abs(first["a"].mean()) < 0.1  # 4.5 standard errors
    others = (first["b"], probe(weights, 4, 0)["a"], probe(weights, 3, 1)["a"])
    assert all(not torch.equal(first["a"], other) for other in others)


def test_the_mean_over_all_signs_is_the_trace(regression):
    """Hutchinson without chance: every vector of ±1 once, on two of the three classes."""
    net, batches, _ = regression
    net = nn.Sequential(nn.Linear(4, 2)).requires_grad_(False)
    batches = [(x, y.clamp(max=1)) for x, y in batches]
    x = torch.cat([x for x, _ in batches])
    p = net(x).softmax(1)
    expected = float(((p * (1 - p)).sum(1) * x.square().sum(1)).mean())
    weights = layer_weights(net, ["0"])
    found = [
        curvatures(net, weights, {"0": torch.tensor(signs).view(2, 4)}, batches)["0"]
        for signs in product((-1.0, 1.0), repeat=8)
    ]
    assert sum(found) / len(found) == pytest.approx(expected, rel=1e-5)


def test_a_product_is_that_of_the_explicit_hessian(small, batches):
    """All layers at once, with the terms between layers, against torch's own Hessian."""
    net = small.eval().requires_grad_(False)
    weights = layer_weights(net, ["stem", "fc"])
    vectors = probe(weights, 0, 0)
    images = torch.cat([x for x, _ in batches])
    targets = torch.cat([y for _, y in batches])

    def loss(stem, fc):
        named = {"stem.weight": stem, "fc.weight": fc}
        return F.cross_entropy(torch.func.functional_call(net, named, (images,)), targets)

    blocks = torch.autograd.functional.hessian(loss, tuple(weights.values()))
    flat = [v.flatten() for v in vectors.values()]
    expected = [
        sum(flat[i] @ blocks[i][j].reshape(len(flat[i]), -1) @ flat[j] for j in range(2))
        for i in range(2)
    ]
    found = curvatures(net, weights, vectors, batches)
    assert list(found.values()) == pytest.approx([float(x) for x in expected], rel=1e-4)


def test_softmax_regression_comes_out_within_its_standard_error(regression):
    net, batches, trace = regression
    estimate = Hessian(0.025, 300).traces(net.requires_grad_(False), batches, seed=0)["0"]
    assert estimate.standard_error <= 0.025 * estimate.trace
    assert abs(estimate.trace - trace) < 4 * estimate.standard_error

    info = LayerInfo("0", 12, 12, 4)
    (row,) = measure(net, [info], batches, relative_standard_error=0.025, max_probes=300).values()
    for bits in (2, 4):
        error = weight_error(net, "0", bits, CONDITIONS)
        expected = trace / 12 * float(error.square().sum())
        assert row.sensitivity[bits] == pytest.approx(expected, rel=0.1)


def test_the_standard_error_is_that_of_the_mean(regression):
    net, batches, _ = regression
    net.requires_grad_(False)
    estimate = Hessian(1e-9, 12).traces(net, batches, seed=5)["0"]
    weights = layer_weights(net, ["0"])
    samples = [curvatures(net, weights, probe(weights, 5, i), batches)["0"] for i in range(12)]
    mean = sum(samples) / 12
    spread = (sum((x - mean) ** 2 for x in samples) / 11) ** 0.5
    assert estimate.trace == pytest.approx(mean)
    assert estimate.standard_error == pytest.approx(spread / 12**0.5)


def test_probing_stops_as_soon_as_every_layer_is_settled(small, batches, monkeypatch, caplog):
    from adq_train.sensitivity import hessian

    calls = []

    def constant(model, weights, vectors, batches, gives_loss):
        calls.append(1)
        noise = (-1) ** len(calls)
        return {name: 1.0 + (0.5 * noise if name == "fc" else 0.0) for name in weights}

    monkeypatch.setattr(hessian, "curvatures", constant)
    # 0.5 and 1.5 in turn: at an even n the standard error is 0.5 / √(n - 1), 0.1 at 26.
    Hessian(0.101, 100).traces(small, batches, seed=0)
    assert len(calls) == 26
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    calls.clear()
    Hessian(0.9, 100).traces(small, batches, seed=0)
    assert len(calls) == hessian.FEWEST_PROBES


def test_too_few_probes_name_the_layers(regression, caplog):
    net, batches, _ = regression
    Hessian(1e-9, 3).traces(net.requires_grad_(False), batches, seed=0)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "after 3 probes" in record.getMessage()
    assert "for 0; raise sensitivity.max_probes" in record.getMessage()


class Bent(nn.Module):
    """Logits (w x)² and 0, with every target on the first: the loss bends down at large w."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.1)

    def forward(self, x):
        z = self.layer(x)
        return torch.cat([z**2, torch.zeros_like(z)], 1)


def test_a_negative_trace_is_kept_and_told(caplog):
    """loss = log(1 + exp(-(w x)²)); at x = 1 its second derivative in w is known."""
    net, images = Bent(), torch.ones(4, 1)
    rows = measure(net, [LayerInfo("layer", 1, 1, 1)], [(images, torch.zeros(4).long())])
    w = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.softplus(-(w**2)), w, create_graph=True)
    (trace,) = torch.autograd.grad(slope, w)
    assert trace < -0.9
    error = weight_error(net, "layer", 2, CONDITIONS)
    expected = float(trace * error.double().square().sum())
    assert rows["layer"].sensitivity[2] == pytest.approx(expected, rel=1e-5)
    assert "the trace is negative for layer: the float model is not at a minimum" in caplog.text


def test_a_row_does_not_depend_on_the_other_layers_asked_for(small, layers, batches):
    whole = measure(small, layers, batches, max_probes=8)
    assert measure(small, layers[2:], batches, max_probes=8) == {"fc": whole["fc"]}
    assert measure(small, layers, batches, seed=1, max_probes=8)["fc"] != whole["fc"]


def test_attention_has_second_derivatives():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = self.layer(x.flatten(2))[:, None]
            return F.scaled_dot_product_attention(x, x, x).sum((1, 2))

    torch.manual_seed(0)
    batches = [(torch.randn(3, 5, 2, 2), torch.randint(4, (3,)))]
    traces = Hessian(max_probes=2).traces(Attention().requires_grad_(False), batches, seed=0)
    assert traces["layer"].trace != 0


def test_the_model_is_left_as_it_was(small, layers, batches):
    state = {name: value.clone() for name, value in small.state_dict().items()}
    measure(small, layers, batches, max_probes=2)
    assert all(module.training for module in small.modules())
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("options", [{"relative_standard_error": 0.0}, {"max_probes": 1}], ids=str)
def test_options_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Hessian(**options)


def test_the_name_is_the_one_in_the_table():
    assert Hessian().name == "hessian"
