"""Which values get a quantizer: graphs small enough to say it by hand."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from adq_train.errors import UserError
from adq_train.quantization.edges import (
    EdgeQuantizer,
    calibrate_edges,
    connect,
    edge_quantizers,
    edges,
)
from adq_train.quantization.graph import Graph
from adq_train.training.optimizers import quantizer_parameters


class Net(nn.Module):
    """Layers a … d, of which a function makes a network."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))
        self.norm, self.relu, self.pool = nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.1)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def residual(n, x):
    x = n.relu(n.norm(n.a(x)))
    return n.d(n.relu(n.b(x) + x))


GRAPHS = {
    "chain": (lambda n, x: n.c(n.pool(n.relu(n.norm(n.b(F.relu(n.a(x))))))), []),
    # What two read: after norm and ReLU; the branch; the sum goes to one layer, and needs none.
    "residual": (residual, ["relu", "b"]),
    "two readers": (lambda n, x: n.c(n.a(x)) + n.d(n.b(x)), ["x", "c", "d"]),
    "sum read twice": (
        lambda n, x: (lambda y: n.c(y) + y)(n.a(x) + n.b(x)),
        ["x", "a", "b", "add", "c"],
    ),
    "sum behind a relu": (
        lambda n, x: (lambda y: n.c(y) + y)(n.relu(n.a(x) + n.b(x))),
        ["x", "a", "b", "relu", "c"],
    ),
    "concatenation": (
        lambda n, x: n.pool(torch.cat([n.a(x), F.relu(n.b(x))], 1)).mean((2, 3)),
        ["x", "a", "relu", "cat"],
    ),
    "average pool between layers": (
        lambda n, x: n.b(F.avg_pool2d(n.relu(n.a(x)), 2)), ["relu"],
    ),
    "average pool at the end": (
        lambda n, x: n.drop(n.a(x)).mean((2, 3)), ["drop"],
    ),
    "max pool that two read": (
        lambda n, x: (lambda y: n.b(y) + n.c(y))(n.pool(n.relu(n.a(x)))), ["relu", "b", "c"],
    ),
    "slices and zeros": (
        lambda n, x: n.b(x) + F.pad(n.a(x)[:, :, ::1], (0, 0, 0, 0, 0, 0)), ["x", "b", "a"],
    ),
    "image read twice": (lambda n, x: n.c(n.a(x)) + x, ["x", "c"]),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_the_rule(name):
    function, expected = GRAPHS[name]
    found = [str(x.name).split("_")[0] for x in edges(Graph(Net(function)))]
    assert sorted(found) == sorted(expected)


def network(function=residual):
    torch.manual_seed(0)
    return Net(function)


def test_connecting_changes_the_forward_and_nothing_else():
    plain, images = network().eval(), torch.randn(3, 2, 8, 8)
    model = copy.deepcopy(plain)
    assert connect(model) is model
    assert isinstance(model, Net)
    calibrate_edges(model, [images], 0)
    assert [name for name, _ in model.named_parameters()] == [
        *(name for name, _ in plain.named_parameters()),
        "edge_quantizers.0.log_step",
        "edge_quantizers.1.log_step",
    ]
    first, second = edge_quantizers(model)
    assert (first.low, first.high) == (0, 255)  # behind a ReLU
    assert (second.low, second.high) == (-128, 127)
    expected = first(plain.relu(plain.norm(plain.a(images))))
    expected = plain.d(plain.relu(second(plain.b(expected)) + expected))
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("kind", [lambda x: x, fx.symbolic_trace], ids=["class", "GraphModule"])
def test_a_copy_has_edges_of_its_own(kind):
    model, images = connect(kind(network().eval())), torch.randn(3, 2, 8, 8)
    calibrate_edges(model, [images], 0)
    before, other = model(images), copy.deepcopy(model)
    assert torch.equal(other(images), before)
    edge_quantizers(other)[0].log_step.data += 1
    assert not torch.equal(other(images), before)
    assert torch.equal(model(images), before)


def test_steps_are_calibrated_on_what_passes_and_learn():
    model, images = connect(network()), torch.randn(8, 2, 8, 8)
    model.eval()
    calibrate_edges(model, [images, 3 * images], 0)
    steps = [x.width().item() for x in edge_quantizers(model)]
    assert all(0 < x < 0.1 for x in steps)
    own = quantizer_parameters(model)
    assert {id(x.log_step) for x in edge_quantizers(model)} == {id(x) for x in own}
    model.train()
    model(images).square().sum().backward()
    assert all(x.log_step.grad.abs() > 0 for x in edge_quantizers(model))


def test_the_gradient_of_a_step_is_lsqs():
    """∂ŷ/∂s = round(x/s) - x/s within the range and its end beyond (eq. 3), times s, √(1/(N Q))."""
    quantizer, x = EdgeQuantizer(), torch.tensor([[0.26, 0.1, -0.2, 99.0]])
    quantizer.log_step.data.fill_(0.25).log_()
    quantizer(x).sum().backward()
    within = sum(round(v / 0.25) - v / 0.25 for v in (0.26, 0.1))
    expected = (within + 0 + 255) * 0.25 / (4 * 255) ** 0.5
    assert float(quantizer.log_step.grad) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_an_edge_is_a_quantizer_of_256_levels(signed):
    quantizer, x = EdgeQuantizer(), torch.randn(2000) + (0 if signed else 9)
    quantizer.calibrate(x)
    assert len(quantizer.levels()) == 256
    assert torch.equal(quantizer(x), quantizer.levels()[quantizer.quantize(x).long()])
    assert (quantizer(x) - x).abs().max() <= quantizer.width() * 10
    again = EdgeQuantizer()
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(x), quantizer(x))


def test_what_is_not_known_is_named():
    with pytest.raises(UserError, match=r"int8 does not know sigmoid \(node sigmoid\); it knows"):
        connect(network(lambda n, x: n.b(n.a(x).sigmoid())))
    words = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with pytest.raises(UserError, match=r"int8 does not know 0 \(node _0\), Embedding; it"):
        list(edges(Graph(words)))


def test_nan_is_refused():
    model = connect(network().eval())
    with pytest.raises(UserError, match=r"edge_quantizers.0: the values hold NaN"):
        calibrate_edges(model, [torch.full((1, 2, 8, 8), torch.nan)], 0)
