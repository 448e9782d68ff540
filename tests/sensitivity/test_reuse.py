"""Partial runs give the very numbers of whole ones, in bounded memory, and skip what they can."""

import copy
import logging

import pytest
import torch
from torch import nn
from torchvision.models import MobileNetV2

from adq_train.data.base import derived_seed
from adq_train.models import CifarResNet
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.copies import own_copy
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.quantization.prepare import replaced
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.perturbation import Perturbation
from adq_train.sensitivity.reuse import PartialRuns, WholeRuns, make_runs, num_bytes

PLENTY = 10**9


class PreActivation(nn.Module):
    """Changes a value in place that a layer has read before, and a view of it besides."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x)
        half = x[:, :2]
        y = self.second(x)
        x.relu_()
        y += x
        return self.fc(torch.cat([y, half], 1).mean((2, 3)))


class Branching(nn.Module):
    """Cannot be traced: which way it goes depends on values."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 6)
        self.second = nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x.flatten(1)[:, :12])
        return self.second(x if x.sum() > 0 else -x)


class Attentive(nn.Module):
    """Its linear layers are called inside a module of torch's that is one operation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.fc(self.block(x).mean(1))


def mobilenet():
    return MobileNetV2(5, 0.25, [[1, 8, 1, 1], [6, 16, 2, 2]], round_nearest=4)


NETWORKS = {
    "resnet8": lambda: CifarResNet(8, 4, 5, 3),
    "mobilenet": mobilenet,
    "in place": PreActivation,
    "leaf with layers": Attentive,
    "untraceable": Branching,
}


def spread(net, seed=0):
    """Random batch norm statistics, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return net.eval().requires_grad_(False)


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return spread(own_copy(NETWORKS[request.param]()))  # as every metric does


@pytest.fixture
def images():
    torch.manual_seed(1)
    return [torch.randn(n, 3, 12, 12) for n in (4, 3)]


def another(layer, name):
    """The same kind of layer with other weights."""
    layer = copy.deepcopy(layer)
    generator = torch.Generator().manual_seed(derived_seed(name))
    layer.weight.data.add_(torch.randn(layer.weight.shape, generator=generator), alpha=0.1)
    return layer


@pytest.mark.parametrize("limit_bytes", [1, 20_000, PLENTY])
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_every_layer_of_every_network_gives_the_logits_of_whole_runs(
    network, images, order, limit_bytes
):
    runs = make_runs(network, images, limit_bytes)
    assert isinstance(runs, WholeRuns if isinstance(network, Branching) else PartialRuns)
    names = [x.name for x in describe_layers(network, images[0][:1])]
    for name in names if order == "forward" else reversed(names):
        layer = network.get_submodule(name)
        for index, batch in enumerate(images):
            before = network(batch)
            run = runs.from_layer(name, index)
            with replaced(network, {name: another(layer, name)}):
                expected = network(batch)
                assert torch.equal(run(), expected)
                assert torch.equal(run(), expected)
            assert not torch.equal(before, expected)
            assert torch.equal(run(), before)


def test_a_shared_layer_is_replaced_at_all_its_calls(small, batches):
    net = spread(small)
    images = [x for x, _ in batches]
    runs = make_runs(net, images, PLENTY)
    assert isinstance(runs, PartialRuns)
    for name in ("stem", "shared", "fc"):
        with replaced(net, {name: another(net.get_submodule(name), name)}):
            for index, batch in enumerate(images):
                assert torch.equal(runs.from_layer(name, index)(), net(batch))


@pytest.mark.parametrize(
    ("tensors", "recalibrate"), [("separate", False), ("both", True)], ids=["apart", "recalibrated"]
)
def test_the_table_is_the_same_to_the_last_bit(images, tensors, recalibrate):
    torch.manual_seed(0)
    net = spread(mobilenet())
    layers = describe_layers(net, images[0][:1])
    batches = [(x, torch.arange(len(x)) % 5) for x in images]
    conditions = Conditions((2, 4), batches, AdqWeightQuantizer, LsqActivationQuantizer)
    tables = [
        list(Perturbation("kl", tensors, recalibrate, kept_bytes).measure(net, layers, conditions))
        for kept_bytes in (0, 30_000, PLENTY)
    ]
    assert tables[0] == tables[1] == tables[2]
    assert len({value for row in tables[0] for value in row.sensitivity.values()}) > len(layers)


@pytest.mark.parametrize(
    ("name", "in_place"), [("resnet8", False), ("mobilenet", True), ("in place", True)]
)
def test_values_are_copied_only_for_a_network_that_changes_them(images, name, in_place):
    assert make_runs(spread(NETWORKS[name]()), images, PLENTY).in_place == in_place


def test_what_lies_before_a_layer_is_computed_once(images):
    net = spread(CifarResNet(8, 4, 5, 3))
    names = [x.name for x in describe_layers(net, images[0][:1])]
    runs = make_runs(net, images, PLENTY)
    calls = []
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    for name in names:
        for index in range(2):
            run = runs.from_layer(name, index)
            for _ in range(3):
                run()
    # Per batch: once on the way to later layers, three times for each layer up to this one.
    expected = {name: 2 * (1 + 3 * (i + 1)) for i, name in enumerate(names)}
    expected[names[-1]] -= 2
    assert {name: calls.count(name) for name in names} == expected


def test_the_kept_values_stay_below_the_limit(images):
    net = spread(CifarResNet(8, 4, 5, 3))
    names = [x.name for x in describe_layers(net, images[0][:1])]
    limit = 4 * 4 * 12 * 12 * 4  # the first stage's values of the first batch alone
    runs = make_runs(net, images, limit)
    counts = []
    for name in names:
        for index in range(2):
            runs.from_layer(name, index)()
            kept = sum(num_bytes(values.values()) for _, values in runs.kept.values())
            assert kept <= limit
        counts.append(len(runs.kept))
    assert min(counts) < 2  # it matters at the wide layers
    assert counts[-1] == 2  # and no longer at the end


def test_memory_that_tensors_share_counts_once():
    x = torch.zeros(10, 10)
    assert num_bytes([x, x[:2], {"a": (x.T, 3, "text")}, None]) == 400
    assert num_bytes([x, [torch.zeros(5)]]) == 420


class Wandering(nn.Module):
    """Draws random numbers, which a trace would freeze."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) + torch.rand(3)


@pytest.mark.parametrize(
    ("net", "message"),
    [(Branching(), "cannot be traced"), (Wandering(), "gives other outputs")],
    ids=["untraceable", "random"],
)
def test_the_plain_path_is_taken_where_a_trace_is_not_the_model(net, message, caplog):
    with caplog.at_level(logging.INFO, logger="adq_train"):
        runs = make_runs(net, [torch.randn(4, 12 if isinstance(net, Branching) else 4)], PLENTY)
    assert isinstance(runs, WholeRuns)
    assert message in caplog.text


def test_no_memory_means_whole_runs(images):
    assert isinstance(make_runs(CifarResNet(8, 4, 5, 3), images, 0), WholeRuns)
