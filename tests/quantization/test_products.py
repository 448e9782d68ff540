"""Products inside attention at eight bits: torch's attention where quantizers change nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adq_train
from adq_train.errors import UserError
from adq_train.quantization.edges import EDGES, edge_quantizers
from adq_train.quantization.products import (
    Products,
    attentions,
    connect_products,
    has_products,
    operand_names,
)

B, H, L, S, E = 2, 4, 5, 7, 3
X = torch.randn(12, L, 8, generator=torch.Generator().manual_seed(0))
AS_IS = Products(*[nn.Identity()] * 4)


class Fused(nn.Module):
    """As timm writes it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.own = nn.Linear(8, 24), nn.Linear(8, 8), False
        self.fused_attn = False

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.product(q, k, v).transpose(1, 2).flatten(2))

    def product(self, q, k, v):
        if self.fused_attn and not self.own:
            return F.scaled_dot_product_attention(q, k, v)
        return (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


class Net(nn.Module):
    """Both kinds of attention."""

    def __init__(self):
        super().__init__()
        self.embed, self.fused = nn.Linear(8, 8), Fused()
        self.torchs, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.fused(x)
        return self.head((x + self.torchs(x, x, x)[0]).mean(1))


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"is_causal": True}, {"scale": 0.3},
        {"attn_mask": torch.randn(L, S)},
        {"attn_mask": torch.rand(B, 1, L, S) > 0.4},
        {"attn_mask": torch.zeros(L, S, dtype=torch.bool)},
    ],
    ids=["none", "causal", "scale", "added", "chosen", "nothing"],
)  # fmt: skip
def test_it_is_torchs_function(settings):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, L, E), torch.randn(B, H, S, E), torch.randn(B, H, S, 6)
    expected = F.scaled_dot_product_attention(q, k, v, **settings)
    torch.testing.assert_close(AS_IS(q, k, v, **settings), expected)


def test_keys_of_several_heads_and_dropout():
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, L, E), torch.randn(B, 2, S, E), torch.randn(B, 2, S, E)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(AS_IS(q, k, v, enable_gqa=True), expected)
    kept = AS_IS.attend(q, k.repeat(1, 2, 1, 1), q.new_ones(B, H, S, 1), dropout=0.5)[1]
    assert 0.3 < (kept == 0).float().mean() < 0.7
    assert AS_IS(q.half(), k.half(), v.half(), enable_gqa=True).dtype == torch.half


def test_each_operand_is_quantized():
    q, k, v = torch.randn(3, B, L, E).unbind(0)
    tenths = Products(*[lambda x, n=n: (x * n).round() / n for n in (10, 20, 30, 40)])
    scores = ((q * 10).round() / 10) @ ((k * 20).round() / 20).mT / E**0.5
    weights = (scores.softmax(-1) * 30).round() / 30
    torch.testing.assert_close(tenths(q, k, v), weights @ ((v * 40).round() / 40))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = adq_train.quantize(Net(), [X], bits={"*": 4}, target="attention")
    optimizer = torch.optim.SGD(adq_train.parameter_groups(model, lr=0.05, weight_decay=0.0))
    adq_train.follow(model, optimizer)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
    assert all(x.log_step.grad != 0 for x in edge_quantizers(model))
    return model.eval()


def test_every_quantizer_works_on_its_own_operand(trained):
    assert operand_names(trained) == [
        f"the {part} of {name}"
        for name in ("fused", "torchs") for part in ("query", "key", "weights", "value")
    ]  # fmt: skip
    expected = trained(X)
    signed = [x.low < 0 for x in edge_quantizers(trained)]
    assert signed == [True, True, False, True] * 2  # attention weights are no less than 0
    for number in range(8):
        other = copy.deepcopy(trained)
        edge_quantizers(other)[number].log_step.data += 2
        assert not torch.equal(other(X), expected)
    assert torch.equal(trained(X), expected)
    plain = adq_train.quantize(Net(), [X], bits={"*": 4})
    assert not has_products(plain)
    assert not edge_quantizers(plain)


def test_weights_that_are_asked_for_are_those_that_are_used(trained):
    attention, x = trained.torchs, X[:2]
    _, weights = attention(x, x, x)
    codes = weights * 2 / edge_quantizers(trained)[6].width()  # the mean of two heads
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert attention(x, x, x, average_attn_weights=False)[1].shape == (2, 2, L, L)
    assert attention(x, x, x, need_weights=False)[1] is None


def test_it_is_saved_loaded_and_exported(trained, tmp_path):
    expected, path = trained(X), tmp_path / "net.safetensors"
    adq_train.save(trained, path)
    again = adq_train.load(path, Net)
    assert torch.equal(again(X), expected)
    assert again.adq.target == "attention"
    adq_train.export(again, path, X)
    packed = adq_train.load_packed(path, network=Net)
    assert torch.equal(packed(X), expected)
    assert len(edge_quantizers(packed)) == 8
    other = Net()
    other.fused = Unfused()
    with pytest.raises(UserError, match="its attentions have 4 operands, not 8"):
        adq_train.load_packed(path, network=other)
    with pytest.raises(UserError, match=r"cannot be followed|does not know"):
        adq_train.export(trained, tmp_path / "net.qdq.onnx", X)


class Unfused(nn.Module):
    """With the names of the other, and without torch's function."""

    forward = Fused.forward

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def product(self, q, k, v):
        return (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def test_onnxruntime_multiplies_the_same(trained, tmp_path):
    pytest.importorskip("onnxruntime")
    agreement = adq_train.export(trained, tmp_path / "net.onnx", X)
    assert agreement.largest_difference < 1e-5


def test_what_does_not_multiply_so_is_refused():
    with pytest.raises(UserError, match="target: attention finds none in this model"):
        adq_train.quantize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), [X], target="attention")
    net = Net()
    net.fused.own = True
    with pytest.raises(UserError, match="target: the query of fused never came to a quantizer"):
        adq_train.quantize(net, [X], target="attention")


def test_a_network_that_is_an_attention_itself():
    torch.manual_seed(0)
    model = adq_train.quantize(
        Fused(), [{"x": X}], bits={"*": 8}, first_last_bits=None, target="attention"
    ).eval()
    assert isinstance(model, Fused)
    before, other = model(X), copy.deepcopy(model)
    getattr(other, EDGES)[3].log_step.data += 2
    assert not torch.equal(other(X), before)


def test_connecting_again_replaces():
    net = Net()
    with pytest.raises(UserError, match="its attentions have 4 operands, not 3"):
        connect_products(net, [nn.Identity()] * 3)
    for _ in range(2):
        connect_products(net, [nn.Identity()] * 4)
    assert list(attentions(net)) == ["fused"]  # torch's own has to be unfused first
    plain = Net()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(X), plain(X))


def test_a_row_in_which_every_key_is_masked_has_the_gradients_of_torch():
    query, key, value = (torch.randn(B, n, E, requires_grad=True) for n in (L, S, S))
    mask = torch.zeros(B, L, S)
    mask[0, 1], mask[1, :, 2] = -torch.inf, -torch.inf
    inputs = query, key, value
    context = AS_IS.attend(*inputs, mask)[0]
    expected = F.scaled_dot_product_attention(*inputs, mask)
    assert (context[0, 1] == 0).all()
    torch.testing.assert_close(context, expected)
    weights = torch.randn(context.shape)
    found = torch.autograd.grad((context * weights).sum(), inputs)
    shown = expected.where(mask.amax(-1, keepdim=True) == 0, 0.0)  # torch's own may be NaN there
    for a, b in zip(found, torch.autograd.grad((shown * weights).sum(), inputs), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)
