"""Embeddings: their weights alone are quantized, at eight bits unless other bits are asked for."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adq_train
from adq_train.deploy.layer_tables import Staircase
from adq_train.deploy.model import assemble, tables_of_network
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.layers import Indices, QuantEmbedding, quantized, quantized_kind
from adq_train.quantization.levels import count_levels
from adq_train.quantization.prepare import quantized_layers
from adq_train.sensitivity.perturbation import Perturbation

WORDS, LENGTH = 50, 6
TOKENS = torch.randint(WORDS, (24, LENGTH), generator=torch.Generator().manual_seed(0))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 8, padding_idx=0), nn.Embedding(LENGTH, 8)
        self.first, self.mid, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.mid(self.first(x).relu()).relu().mean(1))


class Tied(nn.Module):
    """The output layer has the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.first, self.mid = nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, WORDS, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.mid(self.first(self.embed(tokens)).relu()).relu().mean(1))


def form(layer, bits=3):
    quantizer = AdqWeightQuantizer(bits)
    quantizer.calibrate(layer.weight.detach())
    return quantized(layer, quantizer, Indices(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_those_of_the_quantized_weight(dtype):
    layer = nn.Embedding(WORDS, 4, padding_idx=0, dtype=dtype)
    own = form(layer)
    expected = own.weight_quantizer(layer.weight.float())[TOKENS].to(dtype)
    assert torch.equal(own(TOKENS), expected)
    assert not torch.equal(own(TOKENS), layer(TOKENS))
    assert own.weight is layer.weight
    # Padding is not trained, and the rows that no token names are not either.
    own(TOKENS[:2]).sum().backward()
    named = torch.isin(torch.arange(WORDS), TOKENS[:2]) & (torch.arange(WORDS) != 0)
    assert torch.equal((layer.weight.grad != 0).any(1), named)


def test_gradients_by_frequency_stay_so():
    layer = nn.Embedding(4, 2, scale_grad_by_freq=True)
    form(layer)(torch.tensor([1, 1, 2])).sum().backward()
    assert layer.weight.grad[1].tolist() == layer.weight.grad[2].tolist()


def test_embeddings_that_do_more_are_left():
    for other in (nn.Embedding(4, 2, max_norm=1.0), nn.Embedding(4, 2, sparse=True)):
        assert quantized_kind(other) is None
    assert quantized_kind(nn.Embedding(4, 2)) is QuantEmbedding
    assert quantized_kind(nn.EmbeddingBag(4, 2)) is None


def test_they_cost_weights_and_nothing_else():
    words, places, *_ = describe_layers(Text(), TOKENS[:1])
    assert (words.name, words.num_weights, words.macs) == ("words", WORDS * 8, 0)
    assert (places.name, places.num_weights, places.macs) == ("places", LENGTH * 8, 0)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = adq_train.quantize(Text(), [TOKENS], average_bits=3.0, strict=True)
    optimizer = torch.optim.SGD(adq_train.parameter_groups(model, lr=0.05, weight_decay=0.0))
    adq_train.follow(model, optimizer)
    before = model.words.weight.detach().clone()
    for _ in range(3):
        model(TOKENS).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model.words.weight, before)
    return model.eval()


def bits_of(model):
    return {name: x.weight_quantizer.bit_width for name, x in quantized_layers(model).items()}


def test_embeddings_and_both_ends_have_eight_bits(trained):
    bits = bits_of(trained)
    assert {name: x for name, x in bits.items() if name != "mid"} == {
        "words": 8, "places": 8, "first": 8, "head": 8,
    }  # fmt: skip
    assert bits["mid"] <= 3
    levels = {x.name: x for x in count_levels(trained, [TOKENS])}
    assert (levels["words"].activation_levels, levels["words"].weight_levels) == (1, 256)


@pytest.mark.parametrize("ends", [None, 8])
def test_other_bits_are_given_by_name(ends):
    model = adq_train.quantize(
        Text(), [TOKENS], average_bits=3.0, first_last_bits=ends, pinned={"words": 4}
    )
    bits = bits_of(model)
    assert (bits["words"], bits["places"]) == (4, 8)
    assert (bits["first"] == 8) == (ends == 8)


def test_it_is_saved_loaded_and_exported(trained, tmp_path, capfd):
    expected, path = trained(TOKENS), tmp_path / "model.safetensors"
    adq_train.save(trained, path)
    assert torch.equal(adq_train.load(path, Text)(TOKENS), expected)
    adq_train.export(trained, path, TOKENS)
    for unpacked in (True, False):
        packed = adq_train.load_packed(path, unpacked, network=Text)
        assert torch.equal(packed(TOKENS), expected)
    assert "words.weight" not in packed.state_dict()  # there are codes alone
    pytest.importorskip("onnxruntime")
    capfd.readouterr()
    agreement = adq_train.export(trained, tmp_path / "model.onnx", TOKENS)
    assert agreement.largest_difference < 1e-4
    assert not capfd.readouterr().err  # onnxruntime has warnings of its own


def test_tables_of_another_kind_of_input_are_refused(trained):
    tables = tables_of_network(copy.deepcopy(trained))
    indices = tables.layers["words"].input
    for name, stairs in (
        ("mid", indices), ("words", Staircase(2, torch.zeros(1), torch.tensor([0.0, 1.0]))),
    ):  # fmt: skip
        layers = {**tables.layers, name: replace(tables.layers[name], input=stairs)}
        with pytest.raises(UserError, match=f"'{name}' has an input of another kind"):
            assemble(replace(tables, layers=layers), network=Text())


def test_a_weight_in_common_with_the_output_layer_has_one_codebook(tmp_path, caplog):
    torch.manual_seed(0)
    model = adq_train.quantize(Tied(), [TOKENS], average_bits=4.0).eval()
    assert "full precision" not in caplog.text
    # It is the last layer that computes, besides being the embedding.
    assert [x.name for x in model.adq.allocation.layers] == ["first", "mid", "embed"]
    assert bits_of(model) == {"embed": 8, "first": 8, "mid": 4, "out": 8}
    embed, _, _, out = quantized_layers(model).values()
    assert embed.weight_quantizer is out.weight_quantizer
    assert isinstance(embed.input_quantizer, Indices)
    assert not isinstance(out.input_quantizer, Indices)
    weight = embed.weight_quantizer(embed.weight)
    assert torch.equal(embed(TOKENS), F.embedding(TOKENS, weight))
    adq_train.export(model, tmp_path / "a.safetensors", TOKENS)
    packed = adq_train.load_packed(tmp_path / "a.safetensors", network=Tied)
    assert torch.equal(packed(TOKENS), model(TOKENS))
    assert tables_of_network(model).floats.keys() == {"first.bias", "mid.bias"}


@pytest.mark.parametrize("tensors", ["both", "separate"])
def test_what_it_costs_to_quantize_one_is_measured(tensors):
    """By hand: the divergence with that weight quantized."""
    torch.manual_seed(0)
    model = Text().eval()
    found = adq_train.quantize(model, [TOKENS], sensitivity=Perturbation(tensors=tensors))
    (row,) = (x for x in found.adq.table.layers if x.name == "words")
    trial = copy.deepcopy(model)
    trial.words = form(model.words)
    with torch.no_grad():
        before, after = (F.log_softmax(x(TOKENS).double(), 1) for x in (model, trial))
    expected = F.kl_div(after, before, log_target=True, reduction="batchmean").item()
    assert row.sensitivity[3] == pytest.approx(expected, rel=1e-4)
    if tensors == "separate":
        assert row.activation_sensitivity[3] == pytest.approx(0, abs=1e-12)


class Functional(nn.Module):
    """Two layers have the weight of the embedding; one is never called, its weight is read."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid = nn.Embedding(WORDS, 8), nn.Linear(8, 8)
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, WORDS)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = self.inner(self.mid(self.embed(tokens)).relu()).relu()
        return F.linear(x.mean(1), self.out.weight, self.out.bias)


def test_a_layer_that_is_never_called_stays_as_it_is(tmp_path, caplog):
    torch.manual_seed(0)
    model = adq_train.quantize(Functional(), [TOKENS], first_last_bits=None).eval()
    assert "uses the weight of embed without calling that layer" in caplog.text
    assert list(quantized_layers(model)) == ["embed", "mid", "inner"]
    adq_train.save(model, tmp_path / "a.safetensors")
    again = adq_train.load(tmp_path / "a.safetensors", Functional)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert list(quantized_layers(again)) == ["embed", "mid", "inner"]
    adq_train.export(model, tmp_path / "b.safetensors", TOKENS)
    packed = adq_train.load_packed(tmp_path / "b.safetensors", network=Functional)
    assert torch.equal(packed(TOKENS), model(TOKENS))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_padding_stays_zero_among_many_words(bits):
    torch.manual_seed(0)
    layer = nn.Embedding(2000, 16, padding_idx=0)
    quantizer = AdqWeightQuantizer(bits)
    quantizer.calibrate(layer.weight.detach())
    assert (quantizer(layer.weight)[0] == 0).all()
