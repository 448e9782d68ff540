import copy

import torch
from export_helpers import quantized_network, torchvision
from torch import nn

from adq_train.deploy.fold import fold_batch_norms, foldable
from adq_train.deploy.model import assemble
from adq_train.deploy.packed import load_packed, packed_bytes


def test_every_norm_of_a_resnet_goes_into_its_convolution(tmp_path):
    network, model = quantized_network(bits=3, granularity="channel")
    folded = fold_batch_norms(model)
    assert len(folded.folded) == 7
    assert folded.folded["layer1.0.bn2"] == "layer1.0.conv2"
    assert not [name for name in folded.floats if "running" in name]
    path = tmp_path / "folded.safetensors"
    path.write_bytes(packed_bytes(folded)[0])
    loaded = load_packed(path)
    assert not [m for m in loaded.modules() if isinstance(m, nn.BatchNorm2d)]
    images = torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), network(images), rtol=1e-3, atol=1e-3)


def test_each_folded_layer_is_its_convolution_and_norm_in_float64():
    _, model = quantized_network(bits=2)
    folded = fold_batch_norms(model)
    plain = assemble(model)
    for norm_name, name in folded.folded.items():
        table, norm = folded.layers[name].weight, plain.get_submodule(norm_name).double()
        x = torch.randn(2, table.codes.shape[1], 6, 6, dtype=torch.float64)
        weight = model.layers[name].weight.weight().double()
        expected = norm(nn.functional.conv2d(x, weight))
        bias = folded.floats[f"{name}.bias"].double()
        actual = nn.functional.conv2d(x, table.weight().double(), bias)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """Norms that may be folded (good) and norms that may not."""

    def __init__(self, convolution):
        super().__init__()
        self.good, self.good_norm = convolution(), nn.BatchNorm2d(4)
        self.seen, self.seen_norm = convolution(), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = convolution(), nn.BatchNorm2d(4)
        self.relu, self.after_relu = convolution(), nn.BatchNorm2d(4)
        self.batch, self.batch_norm = convolution(), nn.BatchNorm2d(4, track_running_stats=False)
        self.first_norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.good_norm(self.good(self.first_norm(x)))
        y = self.seen(x)
        x = self.seen_norm(y) + y
        x = self.twice_norm(self.twice(self.twice_norm(self.twice(x))))
        x = self.after_relu(self.relu(x).relu())
        return self.batch_norm(self.batch(x))


def test_only_norms_that_see_a_convolution_alone_are_folded():
    _, model = quantized_network()
    packed = assemble(model).layer1[0].conv1
    assert foldable(Net(lambda: copy.deepcopy(packed))) == {"good_norm": "good"}
    # An unquantized convolution keeps its norm.
    assert foldable(Net(lambda: nn.Conv2d(4, 4, 3))) == {}


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced_keeps_its_norms():
    assert foldable(Branching()) == {}


def test_depthwise_convolutions_fold():
    model = torchvision("mobilenet_v3_small")
    network, tables = quantized_network(model, shape=(3, 32, 32), bits=8)
    folded = fold_batch_norms(tables)
    assert len(folded.folded) == sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
