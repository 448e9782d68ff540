import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_train.errors import UserError
from adq_train.quantization.graph import Graph, place


class Says(nn.Module):
    """Has a layer, and calls a function."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Conv2d(2, 2, 3), function

    def forward(self, x):
        return self.function(self.layer(x))


ALL = slice(None)


def kinds(function):
    graph = Graph(Says(function))
    return [graph.operation(x).kind for x in graph][2:-1]


@pytest.mark.parametrize(
    ("function", "kind", "settings"),
    [
        (F.relu, "relu", {}),
        (lambda x: x.relu(), "relu", {}),
        (nn.ReLU(inplace=True), "relu", {}),
        (lambda x: F.relu(x, inplace=True), "relu", {}),
        (nn.ReLU6(), "relu6", {}),
        (lambda x: F.max_pool2d(x, 3, padding=1), "max_pool", {"kernel_size": 3, "padding": 1}),
        (nn.MaxPool2d(3, 2), "max_pool", {"kernel_size": 3, "stride": 2, "padding": 0}),
        (lambda x: F.avg_pool2d(x, 2), "avg_pool", {"kernel_size": 2, "stride": None}),
        (lambda x: F.adaptive_avg_pool2d(x, 1), "adaptive_avg_pool", {"output_size": 1}),
        (lambda x: x.mean((2, 3)), "mean", {"dim": (2, 3), "keepdim": False}),
        (lambda x: x.mean(2, 3), "mean", {"dim": (2, 3), "keepdim": False}),
        (lambda x: torch.mean(x, dim=3, keepdim=True), "mean", {"dim": (3,), "keepdim": True}),
        (lambda x: torch.flatten(x, 1), "flatten", {"start_dim": 1}),
        (lambda x: x.view(x.size(0), -1), "flatten", {"start_dim": 1}),
        (lambda x: x.reshape(x.shape[0], -1), "flatten", {"start_dim": 1}),
        (lambda x: x[:, :, ::2], "slice", {"index": (ALL, ALL, slice(None, None, 2))}),
        (lambda x: F.pad(x, (0, 1)), "pad", {"pad": (0, 1)}),
        (lambda x: x + x, "add", {}),
        (lambda x: x.add_(x), "add", {}),
        (lambda x: operator.iadd(x, x), "add", {}),
        (lambda x: torch.cat([x, x], 1), "cat", {"dim": 1}),
        (lambda x: torch.cat(tensors=(x, x), dim=1), "cat", {"dim": 1}),
        (nn.Dropout(), "identity", {}),
        (nn.BatchNorm2d(2), "batch_norm", {}),
        (nn.Conv2d(2, 2, 1), "layer", {}),
    ],
)  # fmt: skip
def test_one_kind_whatever_the_name(function, kind, settings):
    graph = Graph(Says(function))
    found = graph.operation(list(graph)[-2])
    assert found.kind == kind
    assert {k: found.settings[k] for k in settings} == settings
    inputs = 2 if kind in ("add", "cat") else 1
    assert [x.target for x in found.inputs] == ["layer"] * inputs


@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid,
        lambda x: x * x,
        lambda x: x + 1,  # no value of the network
        lambda x: torch.add(x, x, alpha=2),
        lambda x: F.pad(x, (1, 1), value=1.0),
        lambda x: F.pad(x, (1, 1), "reflect"),
        lambda x: x[0],  # takes an axis away
        nn.Softmax(1),
        lambda x: torch.cat([x, torch.zeros(1)], 1),
    ],
)
def test_what_is_more_than_its_kind_is_another(function):
    assert "other" in kinds(function)


def test_a_branch_on_values_is_refused():
    with pytest.raises(UserError, match=r"cannot be followed.*branches and loops must not"):
        Graph(Says(lambda x: x if x.sum() > 0 else -x))


def test_what_differs_in_training_is_refused_and_named():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.dropout(x, 0.5, self.training))

    network = Drops()
    with pytest.raises(UserError, match=r"dropout \(node dropout\) is another operation in train"):
        Graph(network)
    assert network.training
    assert network.head.training


def test_modes_stay_what_they_were():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    network[1].eval()
    Graph(network)
    assert network.training
    assert not network[1].training


def test_a_place_says_what_calls_it():
    network = nn.Sequential(nn.Conv2d(2, 2, 1), Says(torch.sigmoid))
    graph = Graph(network)
    assert place(list(graph)[-2]) == "sigmoid (node sigmoid in 1)"


def _unpacked(x):
    n, c, h, w = x.shape
    return x.reshape(n, c * h * w)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: x.view(x.size(0), -1), "flatten"),
        (lambda x: x.reshape(x.shape[0], -1), "flatten"),
        (lambda x: x.view(x.size()[0], -1), "flatten"),
        (lambda x: x.view((x.shape[0], -1)), "flatten"),
        (lambda x: x.view(-1, 400), "flatten"),
        (lambda x: torch.reshape(x, (-1, x.shape[1] * x.shape[2])), "flatten"),
        (_unpacked, "flatten"),
        (lambda x: x.view(-1), None),
        (lambda x: x.view(-1, 4, 4), None),
        (lambda x: x.view(x.size(1), -1), None),
        (lambda x: x.view(x.shape[0] * 2, -1), None),
        (lambda x: x.view(8, -1), None),
    ],
)
def test_a_view_is_a_flattening_where_it_keeps_the_first_size(function, kind):
    found = [node.target for node in Graph(Says(function)).fx.nodes]
    assert (torch.flatten in found) == (kind == "flatten")
    assert ("view" in found or "reshape" in found) == (kind is None)


def test_an_input_given_by_name_is_the_first_operand():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(input=x)

    (node,) = [x for x in Graph(Named()) if x.op == "call_module"]
    assert node.kwargs == {}
    assert [x.op for x in node.args] == ["placeholder"]
