"""Networks of any task: batches and results of every form, losses of one's own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adq_train
from adq_train.artifacts import LayerBits
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.prepare import (
    collect_inputs,
    quantize_layer,
    quantized_layers,
    replaced,
)
from adq_train.sensitivity.fisher import Fisher
from adq_train.sensitivity.gradient import Gradient
from adq_train.sensitivity.hessian import Hessian
from adq_train.sensitivity.mse import Mse
from adq_train.sensitivity.perturbation import Perturbation

MAKERS = AdqWeightQuantizer, N2uqActivationQuantizer


class Heads(nn.Module):
    """Two inputs, and a dict of logits, boxes and a number."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 12), nn.Linear(4, 12)
        self.middle = nn.Linear(12, 12)
        self.names, self.boxes = nn.Linear(12, 3), nn.Linear(12, 2)

    def forward(self, x, y):
        h = F.relu(self.middle(F.relu(self.left(x) + self.right(y))))
        return {"names": self.names(h), "boxes": 50 * self.boxes(h), "count": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Heads()


@pytest.fixture
def given():
    torch.manual_seed(1)
    return [{"x": torch.randn(10, 8), "y": torch.randn(10, 4)} for _ in range(2)]


def omega(quantized):
    """As measured, before values were made to fall with more bits."""
    return {row.name: row.measured or row.sensitivity for row in quantized.adq.table.layers}


def by_hand(model, batches, measure, bits=3):
    """Ω of every layer: what ``measure`` gives once that layer alone is quantized."""
    model.eval()
    found = {}

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, batch):
            return self.net(**batch)

    names = [f"net.{name}" for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    whole = Whole()
    with torch.no_grad():
        inputs = collect_inputs(whole, names, batches, 0)
        for name in names:
            form = quantize_layer(whole, LayerBits(name, bits, bits), *MAKERS, inputs, 0)
            with replaced(whole, form):
                found[name.removeprefix("net.")] = measure(whole.eval())
    return found


def test_outputs_of_several_tensors_weigh_the_same(model, given, caplog):
    with caplog.at_level("INFO", logger="adq_train"):
        quantized = adq_train.quantize(model, given, average_bits=3)
    assert "several tensors count" in caplog.text
    assert "whole runs" not in caplog.text  # what lies before a layer is computed once
    before = [model(**batch) for batch in given]
    keys = ("names", "boxes")
    every = {key: torch.cat([x[key] for x in before]).detach() for key in keys}
    power = {key: x.square().sum(1).mean() for key, x in every.items()}
    variance = sum((x - x.mean(0)).square().sum(1).mean() / power[k] for k, x in every.items())

    def distance(whole):
        after = {key: torch.cat([whole(batch)[key] for batch in given]) for key in keys}
        apart = [(after[k] - x).square().sum(1).mean() / power[k] for k, x in every.items()]
        return float(sum(apart) / variance)

    expected = by_hand(model, given, distance)
    assert {name: x[3] for name, x in omega(quantized).items()} == pytest.approx(expected, rel=1e-3)
    assert type(quantized) is Heads
    out = quantized.eval()(**given[0])
    assert set(out) == {"names", "boxes", "count"}
    assert not torch.equal(out["boxes"], before[0]["boxes"])


def test_an_output_of_one_number_for_each_example_weighs_as_a_column_does():
    class Critic(nn.Module):
        def __init__(self, squeeze):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.squeeze = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), squeeze
            self.actor, self.critic = nn.Linear(8, 3), nn.Linear(8, 1)

        def forward(self, x):
            x = self.body(x)
            value = self.critic(x)
            return self.actor(x), value.squeeze(-1) if self.squeeze else value

    x = torch.randn(32, 6)
    options = {"average_bits": 3, "first_last_bits": None}
    flat, column = (adq_train.quantize(Critic(s), [x], **options) for s in (True, False))
    assert omega(flat) == omega(column)
    assert flat(x)[1].shape == (32,)


def test_a_loss_of_ones_own_is_what_rises(model, given):
    targets = [(torch.randint(3, (10,)), torch.randn(10, 2)) for _ in given]
    pairs = list(zip(given, targets, strict=True))

    def loss(result, target):
        return F.cross_entropy(result["names"], target[0]) + F.mse_loss(result["boxes"], target[1])

    quantized = adq_train.quantize(model, pairs, average_bits=3, loss=loss)
    assert quantized.adq.table.metric == "perturbation-loss-both"
    before = sum(loss(model(**x), y) for x, y in pairs) / 2
    rise = by_hand(
        model, given, lambda whole: float(sum(loss(whole(x), y) for x, y in pairs) / 2 - before)
    )
    assert {name: x[3] for name, x in omega(quantized).items()} == pytest.approx(rise, rel=1e-3)

    # One number for each example tells the same, and how sure it is.
    def each(result, target):
        return F.cross_entropy(result["names"], target[0], reduction="none")

    def mean(result, target):
        return F.cross_entropy(result["names"], target[0])

    one, many = (adq_train.quantize(model, pairs, loss=x) for x in (mean, each))
    for name, values in omega(one).items():
        assert omega(many)[name] == pytest.approx(values, rel=1e-4, abs=1e-7)
    assert many.adq.table.layers[0].standard_error is not None


@pytest.mark.parametrize(
    "metric",
    [Fisher(), Hessian(max_probes=4), Perturbation("loss")],
    ids=lambda x: x.name,
)  # fmt: skip
def test_the_usual_loss_given_as_ones_own_gives_the_usual_values(metric):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers)
    model[4].weight.data *= 9  # sure of what it says, which is right: all that changes costs
    batches = [(x, model(x).argmax(1)) for x in torch.randn(2, 12, 6)]
    usual = adq_train.quantize(model, batches, sensitivity=metric)
    for loss in (F.cross_entropy, lambda x, y: F.cross_entropy(x, y, reduction="none")):
        own = adq_train.quantize(model, batches, sensitivity=metric, loss=loss)
        for name, values in omega(usual).items():
            assert omega(own)[name] == pytest.approx(values, rel=1e-3, abs=1e-7)


def test_every_way_in_is_the_same_network(model, given):
    def names(result):
        return result["names"]

    ways = [
        adq_train.quantize(model, given, output=names),
        adq_train.quantize(model, [((x["x"], x["y"]), None) for x in given], output=names),
        adq_train.quantize(
            model,
            [{"ids": 3, "data": x} for x in given],
            forward=lambda net, batch: net(batch["data"]["x"], y=batch["data"]["y"]),
            output=names,
        ),
    ]
    for other in ways[1:]:
        assert omega(other) == omega(ways[0])
        assert other.adq.allocation == ways[0].adq.allocation
    assert ways[0].adq.table.metric == "perturbation-kl-both"


@pytest.mark.parametrize(
    "options",
    [
        {"output": lambda result: result["names"]},
        {"forward": lambda net, x: net(**x)},
        {"loss": lambda result, _: result["names"].square().mean()},
    ],
    ids=lambda x: "".join(x),
)
def test_a_traced_network_is_the_same_network(model, given, options, tmp_path):
    """A GraphModule, whose copies have a class each."""
    own = adq_train.quantize(model, given, average_bits=3, **options).eval()
    traced = torch.fx.symbolic_trace(model)
    found = adq_train.quantize(traced, given, average_bits=3, **options).eval()
    assert isinstance(found, torch.fx.GraphModule)
    assert omega(found) == omega(own)
    adq_train.save(found, tmp_path / "net.safetensors")
    again = adq_train.load(tmp_path / "net.safetensors", traced)
    with torch.no_grad():
        for other in (found, copy.deepcopy(found), again):
            assert torch.equal(other(**given[0])["boxes"], own(**given[0])["boxes"])


def test_operations_are_those_of_one_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    images = [torch.randn(5, 1, 9, 9)]
    plain = adq_train.quantize(model, images, average_bits=3).adq
    own = adq_train.quantize(model, images, average_bits=3, forward=lambda net, x: net(x)).adq
    assert plain.allocation == own.allocation
    assert plain.table == own.table


def test_targets_that_are_no_classes_are_compared_by_distance(caplog):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(20, 4)
    for targets, metric in ((torch.randint(3, (20,)), "kl"), (torch.randn(20, 3), "mse")):
        found = adq_train.quantize(model, [(x, targets)]).adq.table.metric
        assert found == f"perturbation-{metric}-both"
    assert adq_train.quantize(model, [x], sensitivity="mse").adq.table.metric.endswith("mse-both")


def test_budgets_bits_and_omega_of_ones_own(model, given):
    budget = {"model_size_bytes": "0.13x", "bops": 1e5}
    allocation = adq_train.quantize(model, given, budget=budget).adq.allocation
    floats = 4 * sum(x.weight.numel() for x in model.modules() if isinstance(x, nn.Linear))
    assert allocation.model_size_bytes <= 0.13 * floats
    assert allocation.bops <= 1e5

    own = adq_train.quantize(model, given, bits={"m*": [2, 5], "right": 3, "names": 4})
    found = {n: (x.weight_quantizer.bit_width, x.input_quantizer.bit_width)
             for n, x in quantized_layers(own).items()}  # fmt: skip
    assert found == {
        "left": (8, 8), "right": (3, 3), "middle": (2, 5), "names": (4, 4), "boxes": (8, 8),
    }  # fmt: skip
    assert own.adq.allocation.objective is None  # nothing was measured

    values = {"left": 0, "right": 9, "middle": 0, "names": 1, "boxes": 0}
    table = {name: {b: x / b for b in (2, 3, 4)} for name, x in values.items()}
    by_table = adq_train.quantize(model, given, average_bits=3, sensitivity=table)
    again = adq_train.quantize(model, given, average_bits=3, sensitivity=by_table.adq.table)
    bits = {x.name: x.weight_bits for x in by_table.adq.allocation.layers}
    assert bits["right"] == bits["names"] == 4
    assert again.adq.allocation == by_table.adq.allocation

    apart = adq_train.quantize(
        model, given, tied=False,
        budget={"average_weight_bits": 2.5, "average_activation_bits": 3.5},
    )  # fmt: skip
    assert (
        apart.adq.allocation.average_activation_bits
        > 2.5
        >= (apart.adq.allocation.average_weight_bits)
    )
    fewer = adq_train.quantize(model, given, average_bits=3, candidates={"middle": [2]})
    assert quantized_layers(fewer)["middle"].weight_quantizer.bit_width == 2


def last_axis(net, batch):
    return net(**batch)["names"][:, None, :].expand(-1, 4, -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward": lambda net, x: net(x)}, r"forward: it fails on \(10, 8\) .*gets the network"),
        ({"forward": lambda net, x: net(**x)["count"]}, "output: there is no tensor"),
        ({"output": lambda x: x["nothing"]}, r"output: it fails .*KeyError"),
        ({"output": lambda x: [x["names"], x["boxes"].flatten()]}, "different first axes"),
        ({"loss": lambda x, y: 3.0}, "loss: it gives 3.0"),
        ({"loss": lambda x, y: x["names"].mean(), "sensitivity": "kl"}, "loss: .*does not use it"),
        ({"loss": lambda x, y: x["names"].mean(), "sensitivity": Mse()}, "loss: .*mse does not"),
        ({"sensitivity": "kl"}, "needs logits .*several tensors count"),
        ({"sensitivity": Gradient()}, "needs logits .*several tensors count"),
        ({"sensitivity": "kld"}, "sensitivity: must be one of kl, loss, mse"),
        ({"output": lambda x: x["names"], "sensitivity": "loss"}, r"needs pairs of inputs and cla"),
        ({"sensitivity": {"left": {2: 1, 3: 1, 4: 1}}}, "it has no layer right"),
        ({"budget": {"size": 10}}, "budget.size: there is no such limit"),
        ({"budget": {"bops": 0}}, "budget.bops: must be more than 0"),
        ({"budget": {"bops": "0.1"}}, "share of the float model's"),
        ({"budget": {"average_weight_bits": 3}, "average_bits": 3}, "average_bits: it is given in"),
        ({"bits": {"middle": 9}}, "bits: bits.middle must be 2 … 8"),
        ({"bits": {"middle": 3}}, "no pattern of middle matches right, names"),
        ({"bit_widths": (1, 2)}, "bit_widths: must be one or more of 2 … 8"),
        ({"tied": False, "sensitivity": Perturbation("mse")}, "tied: false needs"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_done_is_said(model, given, options, message):
    with pytest.raises(UserError, match=message):
        adq_train.quantize(model, given, **options)


def test_batches_that_do_not_tell_how_they_go_in(model, given):
    loose = [(x["x"], x["y"]) for x in given]
    with pytest.raises(UserError, match=r"model: it fails .*forward=lambda model, batch"):
        adq_train.quantize(model, loose)
    with pytest.raises(UserError, match="some are mappings of x, y and some Tensor"):
        adq_train.quantize(model, [given[0], given[0]["x"]])
    with pytest.raises(UserError, match="let a forward of your own call the network"):
        adq_train.quantize(model, given, forward=lambda net, batch: model(**batch))
    classes = [(x, torch.zeros(10, 4, dtype=torch.long)) for x in given]
    with pytest.raises(UserError, match=r"classes on the last axis; output=lambda y: y\.movedim"):
        adq_train.quantize(
            model, classes, forward=lambda net, pair: last_axis(net, pair[0]), sensitivity="kl"
        )


def test_a_network_of_any_form_goes_to_files_and_back(model, given, tmp_path):
    quantized = adq_train.quantize(model, given, average_bits=3).eval()
    adq_train.save(quantized, tmp_path / "net.safetensors")
    again = adq_train.load(tmp_path / "net.safetensors", Heads)
    found = adq_train.export(again, tmp_path / "packed.safetensors", given[0])
    assert (found.num_images, found.largest_difference) == (10, 0.0)
    packed = adq_train.load_packed(tmp_path / "packed.safetensors", network=model)
    with pytest.raises(UserError, match="format: onnx takes a network from one tensor to one"):
        adq_train.export(again, tmp_path / "net.onnx", given[0])
    with torch.no_grad():
        outputs = [net(**given[1])["boxes"] for net in (quantized, again, packed)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert type(packed) is Heads
