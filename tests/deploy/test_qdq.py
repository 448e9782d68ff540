"""The int8 ONNX file against the integer network, and what onnxruntime makes of it."""

import collections

import pytest
import torch
from export_helpers import SHAPE, int8_network, networks
from torch import nn
from torch.nn import functional as F

import adq_train
from adq_train.deploy.apart import FileHere
from adq_train.deploy.formats import FORMATS, Source
from adq_train.deploy.integer import integer_network
from adq_train.deploy.model import tables_of_network
from adq_train.deploy.packed_layers import Rescale
from adq_train.deploy.qdq import FLOAT_LAYERS, QdqGraph, optimized_kinds, write
from adq_train.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

EXAMPLE = torch.zeros(1, *SHAPE)


def content_of(integer):
    return QdqGraph(integer, EXAMPLE).model().SerializeToString()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = {}
    for name, network in networks().items():
        trained = int8_network(network, SHAPE)
        path = tmp_path_factory.mktemp("qdq") / f"{name}.qdq.onnx"
        path.write_bytes(content_of(integer_network(trained)))
        found[name] = trained, path
    return found


@pytest.mark.parametrize("name", networks())
def test_onnxruntime_computes_the_integer_network(made, name):
    trained, path = made[name]
    integer, runtime = integer_network(trained).double(), FileHere(path, "onnxruntime")
    for size in (1, 3, 200):
        images = torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            expected, found = integer(images.double()).float(), runtime(images)
        distance = (found - expected).abs().amax(1)
        assert (distance > 1e-5).float().mean() <= 0.01  # ties of two codes
        assert distance.max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", networks())
def test_no_layer_is_left_in_float(made, name):
    kinds = optimized_kinds(made[name][1].read_bytes())
    assert not set(kinds) & set(FLOAT_LAYERS)
    assert kinds["QLinearConv"] == {"resnet": 7, "preact": 7, "mixed": 3, "shared": 3}[name]
    assert kinds["QGemm"] == 1
    if name == "resnet":  # nothing is dequantized between the image and the logits
        assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (1, 0)
        assert kinds["QLinearAdd"] == 3


def test_the_file_is_standard_and_holds_int8_weights(made):
    trained, path = made["resnet"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {x.domain for x in model.graph.node} == {""}
    kinds = collections.Counter(
        onnx.TensorProto.DataType.Name(x.data_type)
        for x in model.graph.initializer
        if len(x.dims) > 1
    )
    assert kinds == {"INT8": 8}
    codes = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    layer = integer_network(trained).get_submodule("layer1.0.conv1")
    assert (codes["layer1.0.conv1.weight"] == layer.codes.numpy()).all()
    assert (codes["layer1.0.conv1.weight.scale"] > 0).all()
    assert codes["layer1.0.conv1.bias"].dtype == "int32"


RANGES = [(0, 255), (0, 15), (0, 3), (-128, 127), (-8, 7), (-2, 1), (-127, 127), (-3, 12)]


@pytest.mark.parametrize("second", RANGES)
@pytest.mark.parametrize("first", [None, (0, 255), (-128, 127), (-5, 7)])
def test_codes_end_where_they_should(first, second, tmp_path):
    """Float to integers, and integers to integers of another step: every code, and beyond."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            steps = [Rescale(0.03, *first)] if first else []
            self.steps = nn.Sequential(*steps, Rescale(0.11, *second), nn.Flatten())

        def forward(self, x):
            return self.steps(x)

    network = torch.fx.GraphModule(Steps(), Leaving().trace(Steps()))
    x = torch.linspace(-40, 40, 64 * 100).view(100, *SHAPE)
    (tmp_path / "a.onnx").write_bytes(content_of(network))
    with torch.no_grad():
        expected = network(x)
    found = FileHere(tmp_path / "a.onnx", "onnxruntime")(x)
    codes, wanted = (found / 0.11).round(), (expected / 0.11).round()
    assert (codes != wanted).float().mean() <= 2e-3  # ties
    assert (codes - wanted).abs().max() <= 1
    assert (codes.min(), codes.max()) == (wanted.min(), wanted.max())
    torch.testing.assert_close(found, codes * 0.11, rtol=1e-6, atol=0)


class Leaving(torch.fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return True


class Ends(nn.Module):
    """One operation between two layers."""

    def __init__(self, function, channels=2):
        super().__init__()
        self.first, self.function = nn.Conv2d(1, 2, 3, padding=1), function
        self.last = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        return torch.flatten(self.last(self.function(self.first(x))), 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(F.relu(x), 2, ceil_mode=True, dilation=2),
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        lambda x: F.adaptive_avg_pool2d(x, 4),
        lambda x: F.adaptive_avg_pool2d(x, 8),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x[:, :, 1:-1, ::2],
        lambda x: F.pad(x[:, 1:], (1, 2, 0, 1, 0, 1)),
        lambda x: torch.cat([x, F.relu(x)], 1)[:, ::2],
        lambda x: F.relu6(x) + x,
    ],
)
def test_operations_between_layers(function, tmp_path):
    integer = integer_network(int8_network(Ends(function), SHAPE))
    (tmp_path / "a.onnx").write_bytes(content_of(integer))
    images = torch.randn(50, *SHAPE)
    with torch.no_grad():
        expected = integer.double()(images.double()).float()
    distance = (FileHere(tmp_path / "a.onnx", "onnxruntime")(images) - expected).abs()
    assert (distance > 1e-5).float().mean() < 2e-3


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: F.adaptive_avg_pool2d(x, 3), "adaptive_avg_pool2d"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "avg_pool2d"),
        (lambda x: torch.flatten(x, 2)[..., None], "getitem"),
    ],
)
def test_what_it_cannot_write_is_named(function, said):
    with pytest.raises(UserError, match=rf"cannot write {said}|does not know {said}"):
        content_of(integer_network(int8_network(Ends(function), SHAPE)))


def test_a_network_of_ones_own_as_a_file(tmp_path):
    torch.manual_seed(0)
    images, network = torch.randn(64, *SHAPE), networks()["mixed"]
    model = adq_train.quantize(network, [images], average_bits=4, target="int8")
    file = tmp_path / "model.qdq.onnx"
    agreement = adq_train.export(model, file, images)
    assert agreement.num_images == 64
    assert agreement.different == 0
    assert agreement.moved <= 6
    plain = adq_train.quantize(network, [images], average_bits=4)
    with pytest.raises(UserError, match=r"not one of target=int8.*train it with target=int8"):
        adq_train.export(plain, tmp_path / "b.onnx", images, format="qdq")
    assert [x.name for x in tmp_path.iterdir()] == ["model.qdq.onnx"]


def test_the_report_says_how_many_layers_are_integers(made):
    trained, _ = made["mixed"]
    source = Source(trained, tables_of_network(trained), EXAMPLE, torch.float32)
    (remark,) = write(source).remarks
    assert remark.startswith("onnxruntime computes 4 of 4 layers in integers here (")
    assert FORMATS["qdq"].integer
