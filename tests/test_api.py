"""Quantizing from Python, with networks that nobody here has written for it."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import adq_train
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.lsq import LsqActivationQuantizer, LsqWeightQuantizer
from adq_train.quantization.n2uq import N2uqWeightQuantizer
from adq_train.quantization.prepare import quantized_layers
from adq_train.sensitivity.perturbation import Perturbation

DOCS = Path(__file__).parents[1] / "docs"


def test_the_documented_example_runs_and_keeps_the_accuracy(tmp_path, capsys, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(tmp_path)  # where it writes its files
    names = runpy.run_path("example.py")
    assert names["before"] > 0.85
    assert names["after"] > names["before"] - 0.05
    layers = quantized_layers(names["quantized"])
    assert list(layers) == ["0", "2", "4", "7", "9"]
    assert {layer.weight_quantizer.bit_width for layer in layers.values()} <= {2, 3, 4, 8}
    assert not quantized_layers(names["model"])
    images, trained = names["test_images"], names["quantized"]
    for other in (names["again"], names["packed"]):
        assert torch.equal(other(images), trained(images))
    assert "QuantConv2d" in capsys.readouterr().out


class Odd(nn.Module):
    """Depthwise, grouped and transposed convolutions, a shared layer, a tied weight, attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.mix.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.grouped(self.depthwise(self.depthwise(x))))
        x = self.up(torch.relu(self.down(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.head(torch.relu(self.tied(torch.relu(self.mix(x)))).mean(1))


@pytest.fixture
def batches():
    return [(torch.randn(6, 3, 6, 6), torch.randint(5, (6,))) for _ in range(2)]


def average_bits(model):
    """Over the weights of the layers that are not the first or the last."""
    weights = {
        x.weight: x.weight_quantizer.bit_width for x in list(quantized_layers(model).values())[1:-1]
    }
    return sum(w.numel() * bits for w, bits in weights.items()) / sum(w.numel() for w in weights)


def test_an_odd_network_is_quantized_and_trained(batches, caplog):
    model = Odd()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = adq_train.quantize(model, batches, bit_widths=(2, 4), average_bits=3)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "full precision" not in caplog.text

    layers = quantized_layers(quantized)
    assert list(layers) == [
        "stem", "depthwise", "grouped", "down", "up", "attention.in_proj", "attention.out_proj",
        "mix", "tied", "head",
    ]  # fmt: skip
    assert layers["stem"].weight_quantizer.bit_width == 8
    assert layers["head"].input_quantizer.bit_width == 8
    assert layers["mix"].weight_quantizer is layers["tied"].weight_quantizer
    assert 2 <= average_bits(quantized) <= 3

    groups = adq_train.parameter_groups(quantized, lr=0.05, weight_decay=0.0)
    optimizer = torch.optim.SGD(groups)
    adq_train.follow(quantized, optimizer)
    images, targets = batches[0]
    losses, levels = [], layers["up"].weight_quantizer.levels().clone()
    for _ in range(30):
        loss = nn.functional.cross_entropy(quantized(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(layers["up"].weight_quantizer.levels(), levels)


def test_inputs_alone_give_the_same_as_pairs(batches):
    model = Odd().eval()
    alone = adq_train.quantize(model, (x for x, _ in batches), average_bits=3)
    pairs = adq_train.quantize(model, batches, average_bits=3)
    x = batches[0][0]
    assert torch.equal(alone.eval()(x), pairs.eval()(x))


def test_choices_reach_the_quantizers(batches):
    quantized = adq_train.quantize(
        Odd(),
        batches,
        bit_widths=[3, 2],
        average_bits=2.5,
        first_last_bits=None,
        pinned={"*wise": 5},
        make_weight_quantizer=LsqWeightQuantizer,
        make_activation_quantizer=LsqActivationQuantizer,
        sensitivity=Perturbation(criterion="loss"),
    )
    layers = quantized_layers(quantized)
    assert all(isinstance(x.weight_quantizer, LsqWeightQuantizer) for x in layers.values())
    assert layers["depthwise"].weight_quantizer.bit_width == 5
    others = {x.weight_quantizer.bit_width for n, x in layers.items() if n != "depthwise"}
    assert others == {2, 3}


def test_following_adapts_after_each_step_and_regularizes_before_it():
    calls = []

    class Spy(AdqWeightQuantizer):
        def adapt(self, weight):
            calls.append(("adapt", float(weight.detach().sum())))

    class InputSpy(LsqActivationQuantizer):
        def regularize(self):
            calls.append(("regularize", float(model[0].weight.detach().sum())))

    model = adq_train.quantize(
        nn.Sequential(nn.Linear(4, 2)), [torch.randn(5, 4)], average_bits=4, first_last_bits=None,
        make_weight_quantizer=Spy, make_activation_quantizer=InputSpy,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    adq_train.follow(model, optimizer)
    start = float(model[0].weight.detach().sum())
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [kind for kind, _ in calls] == ["regularize", "adapt", "regularize", "adapt"]
    sums = [of_weights for _, of_weights in calls]
    assert sums[0] == start
    assert sums[1] == sums[2] != start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration_batches": []}, "calibration_batches: there are none"),
        ({"average_bits": 1.5}, "1.5 cannot be reached"),
        ({"pinned": {"missing": 4}}, "no layer is called 'missing'"),
        ({"model": nn.Flatten()}, "no convolution or linear layer"),
        ({"model": nn.Conv2d(3, 2, 1)}, "wrap it in a module"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_cannot_be_done_is_said(batches, change, message):
    with pytest.raises(UserError, match=message):
        adq_train.quantize(**{"model": Odd(), "calibration_batches": batches, **change})


def test_an_argument_that_is_not_there_is_named_as_the_caller_knows_it(batches):
    with pytest.raises(TypeError, match=r"quantize\(\) has no argument 'avarage_bits' \(did you"):
        adq_train.quantize(Odd(), batches, avarage_bits=3)
    with pytest.raises(UserError, match=r"model: must be an nn.Module, got a dict"):
        adq_train.quantize({}, batches)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = adq_train.quantise


@pytest.mark.parametrize("shape", [(1,), (), (1, 2, 2)], ids=str)
def test_one_output_is_quantized_by_its_squared_distance(shape, caplog):
    """A logit, a value (N,), a map of one channel: softmax over it says nothing."""
    torch.manual_seed(0)
    size = torch.Size(shape).numel()
    model = nn.Sequential(*(x for _ in range(3) for x in (nn.Linear(8, 8), nn.ReLU())))
    model.append(nn.Linear(8, size))
    model.append(nn.Flatten(0) if shape == () else nn.Unflatten(1, shape))
    batches = [torch.randn(64, 8)]
    with caplog.at_level("INFO", logger="adq_train"):
        quantized = adq_train.quantize(model, batches, average_bits=4)
    assert "squared distance" in caplog.text
    widths = [x.weight_quantizer.bit_width for x in quantized_layers(quantized).values()]
    assert widths == [8, 4, 4, 8]
    with pytest.raises(UserError, match=r"criterion: kl needs two or more outputs.*criterion=mse"):
        adq_train.quantize(model, batches, average_bits=4, sensitivity=Perturbation())


def test_outputs_that_say_nothing_are_told(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(16, 4)]
    model[2].bias.data.fill_(-100)  # dead
    with pytest.raises(UserError, match=r"every Ω of perturbation-kl-both is 0"):
        adq_train.quantize(model, batches)
    assert "outputs are the same for every calibration image" in caplog.text
    model[4].bias.data[1] = torch.nan
    with pytest.raises(UserError, match=r"float outputs are NaN .* for 16 of 16 .*of 4 \(Linear\)"):
        adq_train.quantize(model, batches)


def small(*last, dtype=torch.float32):
    """Four linear layers from 8 values to 3 logits."""
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3), *last
    ).to(dtype)  # fmt: skip


@pytest.mark.parametrize("cast", ["before", "after"])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_networks_of_other_types_are_quantized_and_trained(dtype, close, cast):
    model, x = small(), torch.randn(16, 8)
    quantized = adq_train.quantize(model, [x], average_bits=3)
    expected = quantized(x)
    if cast == "before":
        quantized = adq_train.quantize(model.to(dtype), [x.to(dtype)], average_bits=3)
    quantized.to(dtype)
    optimizer = torch.optim.SGD(adq_train.parameter_groups(quantized, lr=0.1, weight_decay=0.0))
    adq_train.follow(quantized, optimizer)
    logits = quantized(x.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, atol=close, rtol=close)
    levels = quantized[2].weight_quantizer.levels().clone()
    logits.float().square().mean().backward()
    optimizer.step()
    assert not torch.equal(quantized[2].weight_quantizer.levels(), levels)


def test_wrappers_are_taken_off():
    model, x = small(), torch.randn(16, 8)
    expected = adq_train.quantize(model, [x], average_bits=3).eval()(x)
    compiled = torch.compile(model, backend="eager")
    compiled(x)  # as after any use
    inside = nn.Sequential(torch.compile(nn.DataParallel(model), backend="eager"))
    for wrapped in (compiled, nn.DataParallel(model), inside):
        quantized = adq_train.quantize(wrapped, [x], average_bits=3)
        assert torch.equal(quantized.eval()(x), expected)
        assert not any("_orig_mod" in name for name in quantized.state_dict())


def test_batches_of_any_size():
    x = torch.randn(16, 8)
    quantized = adq_train.quantize(small(), [x[:0], [x], (x, torch.zeros(16))], average_bits=3)
    assert quantized(x[:0]).shape == (0, 3)


def test_a_masked_class_is_told_what_to_use_instead():
    class Masked(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.tensor([0, 0, -torch.inf])

    with pytest.raises(UserError, match="mask a class with -1e4 instead of -inf"):
        adq_train.quantize(Masked(*small()), [torch.randn(16, 8)], average_bits=3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (torch.zeros(4, 8), "it is one Tensor; give a list of batches"),
        ([torch.zeros(0, 8)], "there are none"),
        ([(torch.zeros(4, 8),) * 3], r"batch 0 is \['Tensor', 'Tensor', 'Tensor'\]"),
        ([torch.zeros(4, 8), {"x": torch.zeros(4, 8)}], "some are Tensor and some mappings of x"),
        ([torch.zeros(4, 8).numpy()], "batch 0 is ndarray"),
        ([torch.zeros(())], "batch 0 is Tensor; a batch is a tensor of inputs"),
        ([(torch.zeros(4, 8), torch.zeros(3))], "one entry for each of its 4 inputs"),
        ([torch.zeros(8)], r"fails on an input of shape \(1,\)"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_batches_of_another_form_are_refused(batches, message):
    with pytest.raises(UserError, match=message):
        adq_train.quantize(small(), batches, average_bits=3)


def test_what_is_not_quantized_cannot_be_followed_nor_quantized_twice():
    quantized = adq_train.quantize(small(), [torch.randn(16, 8)], average_bits=3)
    optimizer = torch.optim.SGD(small().parameters(), lr=0.1)
    with pytest.raises(UserError, match="trains none of the model's parameters"):
        adq_train.follow(quantized, optimizer)
    with pytest.raises(UserError, match="no quantized layers"):
        adq_train.follow(small(), optimizer)
    with pytest.raises(UserError, match="quantized already"):
        adq_train.quantize(quantized, [torch.randn(16, 8)])


def test_pruned_weights_stay_zero_in_training(caplog):
    model, x = small(), torch.randn(16, 8)
    prune.l1_unstructured(model[2], "weight", 0.5)
    model(x).sum().backward()  # the made weight has a graph now
    with caplog.at_level("INFO"):
        quantized = adq_train.quantize(model, [x], average_bits=3)
    assert caplog.messages == [
        "2: 50 % of its weights are exactly zero and have a level of their own"
    ]
    optimizer = torch.optim.SGD(adq_train.parameter_groups(quantized, lr=0.1, weight_decay=0.0))
    adq_train.follow(quantized, optimizer)
    for _ in range(5):
        quantized(x).square().mean().backward()
        optimizer.step()
    layer = quantized[2]
    quantized(x)
    assert (layer.weight_quantizer(layer.weight)[layer.weight_mask == 0] == 0).all()
    assert layer.weight_quantizer(layer.weight).count_nonzero() > 64
    other = adq_train.quantize(small(), [x], average_bits=3)[0].weight_quantizer
    assert other.level_set == "no_zero"
    with caplog.at_level("WARNING"):
        adq_train.quantize(model, [x], average_bits=3, make_weight_quantizer=N2uqWeightQuantizer)
    assert "2: 50 % of its weights are exactly zero and do not stay so" in caplog.messages[-1]


def test_the_copy_is_in_evaluation_mode_whatever_the_model_is_in():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout())
    model = model.append(nn.Linear(144, 3)).train()
    x = torch.randn(16, 1, 8, 8)
    quantized = adq_train.quantize(model, [x], first_last_bits=None, bits={"*": 4})
    assert model.training
    assert not any(module.training for module in quantized.modules())
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    assert torch.equal(quantized(x), quantized(x))
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"first_last_bits": 1}, r"first_last_bits: must be one or more of 2 … 8, got \[1\]"),
        ({"first_last_bits": 16}, "first_last_bits"),
        ({"pinned": {"0": 16}}, r"pinned\.0"),
        ({"pinned": {"0": "4"}}, r"pinned\.0"),
        ({"pinned": ["0"]}, r"pinned: must be a mapping by name, got \['0'\]"),
        ({"candidates": {"0": 3}}, r"candidates\.0: must be a list of some of 2 … 8, got 3"),
        ({"average_bits": float("nan")}, "average_bits: must be more than 0, got nan"),
        ({"average_bits": "3"}, "average_bits: must be a number"),
        ({"budget": "0.1x"}, "budget: must be a mapping"),
        ({"tied": "no"}, "tied: must be True or False, got 'no'"),
        ({"full_precision": "head"}, r"full_precision: must be a list of names, got 'head'"),
    ],
)
def test_arguments_of_another_kind_are_refused(options, told):
    with pytest.raises(UserError, match=told):
        adq_train.quantize(nn.Linear(2, 2), [torch.randn(4, 2)], **options)


def test_no_batches_and_inference_mode_are_refused():
    with pytest.raises(UserError, match="calibration_batches: it is one NoneType"):
        adq_train.quantize(nn.Sequential(nn.Linear(2, 2)), None)
    with torch.inference_mode(), pytest.raises(UserError, match="cannot be trained"):
        adq_train.quantize(nn.Sequential(nn.Linear(2, 2)), [torch.randn(4, 2)])
