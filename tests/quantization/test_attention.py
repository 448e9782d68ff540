"""torch's attention with projections that are called computes what it computed."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import adq_train
from adq_train.artifacts import BitAllocation
from adq_train.deploy.model import assemble, float_state, tables_of_network
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.attention import (
    Attention,
    InProjection,
    called,
    can_be_called,
    with_new_names,
)
from adq_train.quantization.copies import own_copy, unfuse
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.prepare import quantized_layers
from adq_train.quantization.restore import restored
from adq_train.states import load_state

N, L, S, E, H = 3, 5, 7, 8, 2


def drawn(seed=0):
    """Attention whose biases are not zero, as at its initialisation."""

    def make(**settings):
        torch.manual_seed(seed)
        attention = nn.MultiheadAttention(E, H, **settings)
        for parameter in attention.parameters():
            nn.init.normal_(parameter)
        return attention.eval()

    return make


def masks(kind):
    """Arguments of a forward(), by what they mask."""
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    ends = torch.arange(S).expand(N, S) >= torch.tensor([[7], [5], [2]])
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "hint": {"attn_mask": causal, "is_causal": True},
        "added": {"attn_mask": torch.randn(L, S)},
        "heads": {"attn_mask": torch.randn(N * H, L, S)},
        "padding": {"key_padding_mask": ends},
        "both": {"attn_mask": causal, "key_padding_mask": ends},
    }[kind]


MASKS = ("none", "causal", "hint", "added", "heads", "padding", "both")


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_it_is_torchs_attention(kind, batch_first, need_weights):
    attention = drawn()(batch_first=batch_first)
    query, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    if not batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    more = {**masks(kind), "need_weights": need_weights}
    for average in (True, False):
        inputs = query, memory, memory
        expected, weights = attention(*inputs, **more, average_attn_weights=average)
        found, own = called(attention)(*inputs, **more, average_attn_weights=average)
        torch.testing.assert_close(found, expected)
        assert (own is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(own, weights)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6}, {"kdim": 6, "vdim": 4}])
@pytest.mark.parametrize("same", ["all", "keys", "none"])
def test_every_way_to_project(same, sizes, bias):
    attention = drawn()(batch_first=True, bias=bias, **sizes)
    query = torch.randn(N, S, E)
    key = torch.randn(N, S, sizes.get("kdim", E))
    value = torch.randn(N, S, sizes.get("vdim", E))
    if same == "all" and not sizes:
        key = value = query
    elif same == "keys" and key.shape == value.shape:
        value = key
    form = called(attention)
    torch.testing.assert_close(form(query, key, value)[0], attention(query, key, value)[0])
    names = ["in_proj"] if not sizes else ["q_proj", "k_proj", "v_proj"]
    assert [name for name, _ in form.named_children()] == [*names, "out_proj"]
    assert (form.out_proj.bias is None) == (not bias)


def test_without_batches_and_in_training():
    attention = drawn()(dropout=0.5)
    x = torch.randn(L, E)
    torch.testing.assert_close(called(attention)(x, x, x), attention(x, x, x))
    form, batch = called(attention.train()), torch.randn(L, N, E)
    for need_weights in (True, False):
        kept = torch.stack([form(batch, batch, batch, None, need_weights)[0] for _ in range(400)])
        plain = called(attention.eval())(batch, batch, batch)[0]
        assert (kept.std(0) > 0).all()  # something is dropped
        assert ((kept.mean(0) - plain).abs() <= 5 * kept.std(0) / 400**0.5).all()
    with pytest.raises(RuntimeError, match="is_causal is a hint about attn_mask"):
        form(batch, batch, batch, is_causal=True)


def test_gradients_are_torchs():
    attention = drawn()(batch_first=True)
    form, x = called(copy.deepcopy(attention)), torch.randn(N, L, E)
    for module in (attention, form):
        module(x, x, x)[0].square().sum().backward()
    for own, torchs in (
        (form.in_proj.weight, attention.in_proj_weight),
        (form.in_proj.bias, attention.in_proj_bias),
        (form.out_proj.weight, attention.out_proj.weight),
    ):
        torch.testing.assert_close(own.grad, torchs.grad, rtol=1e-4, atol=1e-3)


def test_parameters_are_shared_and_the_other_is_left():
    attention = drawn()()
    names = list(attention.state_dict())
    form = called(attention)
    assert form.in_proj.weight is attention.in_proj_weight
    assert form.out_proj.weight is attention.out_proj.weight
    assert list(attention.state_dict()) == names
    assert type(form.in_proj) is InProjection
    assert {x.device.type for x in form.parameters()} == {"cpu"}


class Own(nn.MultiheadAttention):
    pass


def test_what_is_not_torchs_plain_attention_is_left():
    for other in (
        drawn()(add_bias_kv=True), drawn()(add_zero_attn=True), Own(E, H), nn.Linear(2, 2),
    ):  # fmt: skip
        assert not can_be_called(other)
    replaced = drawn()()
    replaced.forward = lambda *x: x
    assert not can_be_called(replaced)
    assert can_be_called(drawn()())


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 4}])
def test_older_names_are_read(sizes):
    attention = drawn()(**sizes)
    network = nn.Sequential(called(drawn(1)(**sizes)))
    state = {f"0.{name}": x for name, x in attention.state_dict().items()}
    load_state(network, state)
    expected = called(attention).state_dict()
    for name, tensor in network[0].state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert with_new_names(network, state).keys() == network.state_dict().keys()


class Classifier(nn.Module):
    """Self-attention, attention over a memory, and one attention that two names have."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, E)
        self.layer = nn.TransformerDecoderLayer(E, H, 12, 0.0, batch_first=True)
        self.again = self.layer.self_attn
        self.head = nn.Linear(E, 3)

    def forward(self, x):
        x = self.embed(x)
        x = self.layer(x, x.flip(1)) + self.again(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


X = torch.randn(16, L, 4, generator=torch.Generator().manual_seed(0))
NAMES = [
    "embed", "layer.self_attn.in_proj", "layer.self_attn.out_proj",
    "layer.multihead_attn.in_proj", "layer.multihead_attn.out_proj", "layer.linear1",
    "layer.linear2", "head",
]  # fmt: skip


def test_a_network_is_described_through_its_attention(caplog):
    torch.manual_seed(0)
    model = Classifier().eval()
    expected = model(X)
    found = {x.name: x for x in describe_layers(model, X[:1])}
    assert list(found) == NAMES
    assert not caplog.messages
    twice = found["layer.self_attn.in_proj"]
    assert (twice.num_weights, twice.num_inputs) == (3 * E * E, 2 * L * E)
    assert twice.macs == 2 * L * 3 * E * E
    # Queries are of other inputs than keys and values, in two calls.
    cross = found["layer.multihead_attn.in_proj"]
    assert (cross.macs, cross.num_inputs) == (L * 3 * E * E, 2 * L * E)
    assert type(model.layer.self_attn) is nn.MultiheadAttention
    copied = own_copy(model)
    assert copied.again is copied.layer.self_attn
    torch.testing.assert_close(copied(X), expected)
    unfuse(copied)
    assert type(copied.again) is Attention


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    model = adq_train.quantize(Classifier(), [X], average_bits=3.0)
    optimizer = torch.optim.SGD(adq_train.parameter_groups(model, lr=0.05, weight_decay=0.0))
    adq_train.follow(model, optimizer)
    before = {name: x.weight.detach().clone() for name, x in quantized_layers(model).items()}
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
    for name, layer in quantized_layers(model).items():
        assert not torch.equal(layer.weight, before[name]), name
    return model.eval()


def test_it_is_trained_saved_loaded_and_exported(quantized, tmp_path):
    assert list(quantized_layers(quantized)) == [
        "embed", *NAMES[1:5], "layer.linear1", "layer.linear2", "head",
    ]  # fmt: skip
    expected, path = quantized(X), tmp_path / "model.safetensors"
    adq_train.save(quantized, path)
    assert torch.equal(adq_train.load(path, Classifier)(X), expected)
    adq_train.export(quantized, path, X)
    assert torch.equal(adq_train.load_packed(path, network=Classifier)(X), expected)
    # A layer of two names is in the file once, and not in float besides.
    assert not [x for x in tables_of_network(copy.deepcopy(quantized)).floats if "again" in x]
    pytest.importorskip("onnxruntime")
    assert adq_train.export(quantized, tmp_path / "m.onnx", X).largest_difference < 1e-4


def test_inputs_are_quantized_where_they_go_in(quantized):
    """With projections whose inputs are all zero, the attention sees nothing of them."""
    model = copy.deepcopy(quantized)
    layer = model.layer.multihead_attn.in_proj

    class Zero(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    layer.input_quantizer = Zero()
    one, other = (model.layer.multihead_attn(x, x, x)[0] for x in torch.randn(2, N, L, E))
    assert torch.equal(one, other)


def test_states_of_before_attention_was_quantized_are_read(quantized):
    """Of a network of which all but its attention was."""
    allocation = quantized.adq.allocation
    few = [x for x in allocation.layers if "attn" not in x.name]
    allocation = BitAllocation(**{**vars(allocation), "layers": tuple(few)})
    make, float_model = (AdqWeightQuantizer, N2uqActivationQuantizer), Classifier().eval()
    from adq_train.quantization.prepare import collect_inputs, prepare

    model = own_copy(float_model)
    inputs = collect_inputs(model, [x.name for x in allocation.layers], [X], 0)
    prepare(model, allocation, *make, inputs, 0)
    old = {}
    for name, tensor in model.state_dict().items():
        old[name.replace(".in_proj.", ".in_proj_")] = tensor
    again = restored(own_copy(Classifier()), allocation, make, old)
    assert torch.equal(again(X), model(X))
    tables = tables_of_network(copy.deepcopy(model))
    floats = {name.replace(".in_proj.", ".in_proj_"): x for name, x in tables.floats.items()}
    assert floats.keys() != float_state(model, tables.layers).keys()
    tables.floats.clear()
    tables.floats.update(floats)
    assert torch.equal(assemble(tables, network=Classifier())(X), model(X))


def test_torchvisions_vision_transformer_is_quantized_whole(caplog):
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3)
    names = [x.name for x in describe_layers(model, torch.zeros(1, 3, 16, 16))]
    assert len(names) == 1 + 2 * 4 + 1
    (message,) = caplog.messages
    assert message.startswith("encoder.pos_embedding stays in full precision")


def test_profiling_reuses_what_lies_before_attention():
    from adq_train.sensitivity.reuse import PartialRuns, make_runs

    class Lined(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(4, E), nn.Linear(E, 3)
            self.attention = nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.attention(x, x, x)[0].mean(1))

    model = own_copy(Lined()).eval()
    runs = make_runs(model, [X], 10**9)
    assert isinstance(runs, PartialRuns)
    for name in ("embed", "attention.in_proj", "attention.out_proj", "head"):
        assert torch.equal(runs.from_layer(name, 0)(), model(X))
