"""The file in LiteRT against the integer network in torch."""

import pytest
import torch
from export_helpers import int8_network
from torch import nn
from torch.nn import functional as F

from adq_train.deploy.apart import FileHere
from adq_train.deploy.integer import Rescale, integer_graph, integer_network
from adq_train.deploy.tflite import program_of
from adq_train.deploy.tflite_file import file_bytes
from adq_train.errors import UserError
from adq_train.models import CifarResNet

pytest.importorskip("ai_edge_litert.interpreter")
SHAPE = (2, 9, 10)


class Mixed(nn.Module):
    """What the ResNets lack."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.dilated = nn.Conv2d(16, 4, 3, padding=2, dilation=2)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.head, self.last = nn.Linear(120, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu6(self.norm(self.first(x)))
        x = torch.cat([torch.relu(self.grouped(x)), self.depthwise(x)], 1)
        x = self.dilated(F.avg_pool2d(x, 3, 1, 1))
        return self.last(F.relu(self.head(self.pool(x).flatten(1))))


class Convolutional(nn.Module):
    """Ends in a mean."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 3, 2), nn.Conv2d(6, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.pool(F.relu(self.last(F.relu(self.first(x))))).flatten(1)


NETWORKS = {
    "resnet": lambda: CifarResNet(8, 4, 5, 2),
    "mixed": Mixed,
    "convolutional": Convolutional,
}


def litert(network, path, example):
    path.write_bytes(file_bytes(program_of(network, example), {}))
    return FileHere(path, "LiteRT")


@pytest.mark.parametrize("name", NETWORKS)
def test_litert_computes_the_integer_network(name, tmp_path):
    torch.manual_seed(1)
    network = integer_network(int8_network(NETWORKS[name](), SHAPE, weights="n2uq"))
    images = torch.randn(200, *SHAPE)
    expected = network(images)
    file = litert(network, tmp_path / "model.tflite", images)
    found = file(images)
    # A code that lies between two may differ by one, and what follows from it.
    reach = expected.abs().max()
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.98
    assert (found - expected).abs().amax(1).median() < 0.01 * reach
    assert (found - expected).abs().max() < 0.2 * reach
    assert torch.equal(file(images[3:4]), found[3:4])  # another number of images


def test_layers_run_on_integers_alone():
    network = integer_network(int8_network(Mixed(), SHAPE, weights="n2uq"))
    program = program_of(network, torch.zeros(1, *SHAPE))
    kinds = [x.kind for x in program.operations]
    # Only what the network returns has 16 bits, and its way there is by float.
    assert kinds[0] == "QUANTIZE"
    assert kinds[-4:] == ["DEQUANTIZE", "QUANTIZE", "FULLY_CONNECTED", "DEQUANTIZE"]
    between = program.operations[1:-4]
    assert {x.dtype for op in between for x in (op.inputs[0], op.output)} == {"int8"}
    # Four convolutions and a pool, which is a depthwise one.
    assert kinds.count("CONV_2D") + kinds.count("DEPTHWISE_CONV_2D") == 4 + 1


class Refused(nn.Module):
    """A forward() on values with a step."""

    def __init__(self, forward):
        super().__init__()
        self.run = forward
        self.step, self.other = Rescale(0.1, 0, 255), Rescale(0.2, -128, 127)
        self.holes, self.max_pool = nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(1)
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.run(self, x)


REFUSED = {
    "of torch alone": (lambda m, x: m.step(torch.sigmoid(m.step(x))), "sigmoid .*not among"),
    "an image that is returned": (lambda m, x: m.step(x), "output .*an image"),
    "a flattened one": (lambda m, x: m.step(x).flatten(1), "output .*an image"),
    "a layer in float": (lambda m, x: m.step(m.conv(m.step(x))), "conv .*not among"),
    "on the images": (lambda m, x: m.step(x + m.step(x)), "add .*before they have a step"),
    "a sum that is returned": (lambda m, x: m.step(x) + m.other(x), "add .*returns what it makes"),
    "a pool that is returned": (lambda m, x: m.max_pool(F.adaptive_avg_pool2d(m.step(x), 1)),
                                "max_pool .*returns what it makes"),
    "no step between": (lambda m, x: m.step(F.avg_pool2d(m.step(x) + m.other(x), 3)),
                        "add .*no step before avg_pool2d"),
    "two readers": (lambda m, x: (lambda s: m.step(s) + m.other(s))(m.step(x) + m.other(x)),
                    "add .*2 operations read it"),
    "along the rows": (lambda m, x: m.step(torch.cat([m.step(x), m.other(x)], 2)), "dimension 2"),
    "uneven windows": (lambda m, x: m.step(F.adaptive_avg_pool2d(m.step(x), 4)), "uneven size"),
    "padding that does not count": (
        lambda m, x: m.step(F.avg_pool2d(m.step(x), 3, 1, 1, count_include_pad=False)),
        "avg_pool2d .*does not count"),
    "holes in a window": (lambda m, x: m.holes(m.step(x)), "dilation"),
    "a part": (lambda m, x: m.step(x)[:, :, 1:], "getitem .*part of an image"),
    "some channels": (lambda m, x: m.step(x)[:, ::2], "getitem .*channels"),
    "cutting": (lambda m, x: F.pad(m.step(x), (-1, 0)), "cuts off"),
    "a ReLU6 that is returned": (lambda m, x: F.relu6(m.other(x)), "relu6 .*returns what"),
    "flattened rows": (lambda m, x: m.step(x).flatten(2), "flatten .*other dimensions"),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_written_names_its_place(forward, message):
    module = Refused(forward)
    network = torch.fx.GraphModule(module, integer_graph(module).fx)
    with pytest.raises(UserError, match=rf"LiteRT's integer kernels cannot run .*{message}"):
        program_of(network, torch.zeros(1, *SHAPE))


def test_a_relu_of_a_value_that_others_read(tmp_path):
    """One keeps the value's step, one is cut at 6."""

    def forward(m, x):
        x = m.other(x)
        return m.pool(m.sum(F.relu(x) + m.third(F.relu6(x)))).flatten(1)

    torch.manual_seed(0)
    module = Refused(forward)
    module.third, module.sum = Rescale(0.0717, 0, 255), Rescale(0.1513, 0, 255)
    module.pool = nn.AdaptiveAvgPool2d(1)
    network = torch.fx.GraphModule(module, integer_graph(module).fx)
    images = 8 * torch.randn(20, *SHAPE)
    found = litert(network, tmp_path / "m.tflite", images)(images)
    assert torch.allclose(found, network(images), atol=0.01)
    assert network(images).std() > 0.3
