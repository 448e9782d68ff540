import copy
import sys
from dataclasses import replace

import pytest
import torch
from export_helpers import int8_network, quantized_network
from torch import nn

import adq_train
from adq_train.deploy import qonnx
from adq_train.deploy.apart import FileApart, FileHere
from adq_train.deploy.formats import Source
from adq_train.deploy.integers import integer_grid
from adq_train.deploy.layer_tables import Staircase
from adq_train.deploy.model import tables_of_network
from adq_train.deploy.onnx_checks import check_operations
from adq_train.deploy.packed_layers import PackedLayer, Steps
from adq_train.deploy.qonnx_graph import datatype_of
from adq_train.errors import UserError
from adq_train.models import CifarResNet
from adq_train.quantization.lsq import LsqWeightQuantizer

onnx = pytest.importorskip("onnx")
pytest.importorskip("qonnx")


def source_of(images, **how):
    network, model = quantized_network(**how)
    return Source(network, model, images, torch.float32)


def tensors(path, images):
    """Every tensor on the way to the logits, by name."""
    found = FileHere(path, "qonnx").graph.tensors(images.numpy(), everything=True)
    return {k: torch.from_numpy(v.copy()) for k, v in found.items() if v is not None}


@pytest.fixture(scope="module")
def images():
    return torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def written(tmp_path_factory, images):
    """A ResNet-8 with weights on a grid and N2UQ's thresholds."""
    source = source_of(images, bits=3, weights="lsq", inputs="n2uq")
    path = tmp_path_factory.mktemp("qonnx") / "model.qonnx.onnx"
    result = qonnx.write(source)
    path.write_bytes(result.content)
    return source, path, result


def test_the_executor_gives_the_trained_network(written, images):
    source, path, result = written
    assert result.remarks == ()
    with torch.no_grad():
        expected = source.network(images)
        torch.testing.assert_close(FileHere(path, "qonnx")(images), expected, atol=1e-5, rtol=1e-5)


def test_every_integer_on_the_way_is_the_code_of_our_layer(written, images):
    _, path, result = written
    codes, reference = {}, result.reference
    for name, layer in reference.named_modules():
        if isinstance(layer, PackedLayer):
            layer.steps.register_forward_pre_hook(
                lambda steps, args, name=name: codes.update(
                    {name: steps.codes(args[0]).int() - steps.zero_point}
                )
            )
    with torch.no_grad():
        reference(images)
    answers = tensors(path, images)
    assert len(codes) == 8
    for name, expected in codes.items():
        found = answers[f"{name.replace('.', '_')}_codes"]
        assert (found != expected.float()).float().mean() < 1e-4, name


def test_sums_are_exact_integers(written, images):
    answers = tensors(written[1], images[:4])
    weight = answers["layer1.0.conv1.weight"].long()
    codes = answers["layer1_0_conv1_codes"].long()
    exact = nn.functional.conv2d(codes.double(), weight.double(), padding=1)
    assert torch.equal(answers["layer1_0_conv1_sums"].double(), exact)


def test_weights_and_codes_have_the_narrowest_datatypes(written):
    from qonnx.core.datatype import DataType
    from qonnx.core.modelwrapper import ModelWrapper

    model = ModelWrapper(str(written[1]))
    kinds = {x.output[0]: model.get_tensor_datatype(x.output[0]) for x in model.graph.node}
    assert kinds["layer1_0_conv1_codes"] == DataType["UINT3"]
    assert kinds["layer1_0_conv1_sums"] == DataType["INT32"]
    assert model.get_tensor_datatype("layer1.0.conv1.weight") == DataType["INT3"]
    weight = model.get_initializer("layer1.0.conv1.weight")
    assert set(weight.flatten()) <= set(range(-4, 4))
    assert {x.op_type for x in model.graph.node if x.domain} == {"MultiThreshold"}
    onnx.checker.check_model(onnx.load(written[1]))


@pytest.mark.parametrize(
    "levels", [[0.0, 0.3, 0.6, 0.9], [-0.9, -0.3, 0.3, 0.9], [0.0, 0.25, 0.5, 1.0]]
)
def test_ties_fall_as_in_training(tmp_path, levels):
    """Inputs exactly on thresholds, and their neighbours among float32 numbers."""
    stairs = Staircase(2, torch.tensor([-0.5, 0.1, 0.7]), torch.tensor(levels))
    network, model = quantized_network()
    bent = replace(model.layers["conv1"], input=stairs)
    model = replace(model, layers={**model.layers, "conv1": bent})
    source = Source(network, model, torch.zeros(1, 1, 8, 8), torch.float32)
    path = tmp_path / "a"
    path.write_bytes(qonnx.write(source).content)
    up = torch.full((3,), torch.inf)
    at = stairs.thresholds
    ties = torch.cat([at, torch.nextafter(at, up), torch.nextafter(at, -up), torch.randn(55)])
    found = tensors(path, ties.view(1, 1, 8, 8))["conv1_codes"]
    expected = Steps(stairs)(ties)
    torch.testing.assert_close(found.flatten() * integer_grid(stairs.levels).step, expected)


def test_levels_off_every_grid_are_rounded_and_that_is_said(tmp_path, images):
    source = source_of(images, bits=3, weights="adq")
    result = qonnx.write(source)
    assert (
        "no integers times a step; they are rounded to integers of eight bits" in result.remarks[0]
    )
    path = tmp_path / "a"
    path.write_bytes(result.content)
    found = FileHere(path, "qonnx")(images)
    with torch.no_grad():
        torch.testing.assert_close(found, result.reference(images), atol=1e-4, rtol=1e-4)
        assert float((found - source.network(images)).abs().max()) > 1e-3


def test_a_file_of_anybody_answers_as_here(written, images):
    apart = FileApart(written[1], "qonnx")
    assert apart.expects.image_shape == (1, 8, 8)
    for count in (1, 5):
        assert torch.equal(apart(images[:count]), FileHere(written[1], "qonnx")(images[:count]))
    assert 0 < apart.seconds < 60


def test_what_is_no_onnx_file_is_an_error(tmp_path):
    path = tmp_path / "a.qonnx.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"qonnx cannot read it .it is no ONNX file"):
        FileHere(path, "qonnx")


def test_edges_of_an_int8_network_are_thresholds_too(tmp_path, images):
    network = int8_network(CifarResNet(8, 4, 10, 1), (1, 8, 8), bits=3)
    source = Source(network, tables_of_network(network), images, torch.float32)
    result = qonnx.write(source)
    assert result.remarks == ()  # codebooks on int8 grids
    path = tmp_path / "a"
    path.write_bytes(result.content)
    with torch.no_grad():
        expected = source.network(images)
    torch.testing.assert_close(FileHere(path, "qonnx")(images), expected, atol=1e-4, rtol=1e-4)
    nodes = onnx.load(path).graph.node
    kinds = [x.op_type for x in nodes]
    edges = len(source.network.edge_quantizers)
    assert kinds.count("MultiThreshold") == 8 + edges > 8
    # One scale and one offset behind each layer: the batch norm is in them.
    sums = {x.output[0] for x in nodes if x.op_type in ("Conv", "MatMul")}
    scaled = [x for x in nodes if x.op_type == "Mul" and x.input[0] in sums]
    assert len(scaled) == 8
    assert kinds.count("Add") == 8 + 3
    # What only hands integers on is given integers.
    assert all(x.input[0].endswith("_codes") for x in nodes if x.op_type == "Slice")


class Plain(nn.Module):
    """Pools, a batch norm alone, an addition, a slice and padding."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding="same")
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.third = nn.Linear(12, 7)
        self.last, self.end = nn.Linear(7, 5), nn.Identity()

    def forward(self, x):
        x = self.pool(torch.relu(self.first(x)))
        y = nn.functional.relu6(self.second(x)) + nn.functional.avg_pool2d(x, 2)
        y = torch.cat([self.norm(y), nn.functional.pad(y, (0, 0, 0, 0, 1, 1))[:, 1:7]], 1)
        y = nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.end(self.last(torch.relu(self.third(y))))


@pytest.fixture(scope="module")
def plain(images):
    torch.manual_seed(0)
    return adq_train.quantize(
        Plain(), [images], average_bits=3, make_weight_quantizer=LsqWeightQuantizer
    )


def test_a_network_of_ones_own(tmp_path, plain, images):
    path = tmp_path / "model.qonnx.onnx"
    agreement = adq_train.export(plain, path, images)
    assert (agreement.different, agreement.moved, agreement.num_images) == (0, 0, 24)
    nodes = onnx.load(path).graph.node
    kinds = [x.op_type for x in nodes]
    assert kinds.count("MultiThreshold") == 4
    # A ReLU that thresholds behind it do as well is gone; that before a sum is not.
    assert kinds.count("Relu") == 1
    pool = next(x for x in nodes if x.op_type == "MaxPool")
    assert pool.input[0] != "second_codes"  # two read what it gives


def test_thresholds_stand_before_the_pool_that_they_alone_read(tmp_path, images):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(36, 5)

        def forward(self, x):
            return self.second(nn.functional.max_pool2d(torch.relu(self.first(x)), 2).flatten(1))

    model = adq_train.quantize(Pooled(), [images], average_bits=4, first_last_bits=None)
    path = tmp_path / "a.qonnx.onnx"
    assert adq_train.export(model, path, images).different == 0
    kinds = [x.op_type for x in onnx.load(path).graph.node]
    assert kinds == [
        "MultiThreshold", "Conv", "Mul", "Add", "MultiThreshold", "MaxPool", "Flatten", "MatMul",
        "Mul", "Add",
    ]  # fmt: skip


def test_what_is_not_known_is_named(tmp_path, plain, images):
    model = copy.deepcopy(plain)
    model.end = nn.Tanh()
    with pytest.raises(UserError, match=r"qonnx does not know end \(node end.*use format=onnx"):
        adq_train.export(model, tmp_path / "a.qonnx.onnx", images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "chunk"),
        (lambda x: nn.functional.avg_pool2d(x, x.size(2)), "size"),
    ],
)
def test_what_gives_no_tensor_is_named(tmp_path, images, function, said):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 4, 3), nn.LazyLinear(5)

        def forward(self, x):
            return self.last(function(torch.relu(self.first(x))).flatten(1))

    network = Between()
    network(images)
    model = adq_train.quantize(network, [images], average_bits=4, first_last_bits=None)
    with pytest.raises(UserError, match=rf"qonnx does not know {said} \(node {said}\)"):
        adq_train.export(model, tmp_path / "a.qonnx.onnx", images)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_says_how_to_get_it(monkeypatch, plain, images, tmp_path):
    monkeypatch.setitem(sys.modules, "qonnx", None)
    with pytest.raises(UserError, match=r"needs the package qonnx; .*adq-train\[fpga\]"):
        adq_train.export(plain, tmp_path / "a.qonnx.onnx", images)


def changed(path, change):
    """The same file after a change of its model."""
    proto = onnx.load(path)
    change(proto)
    new = path.with_name("changed.qonnx.onnx")
    onnx.save(proto, new)
    return new


@pytest.mark.parametrize(
    ("domain", "kind"),
    [("antigravity", "MultiThreshold"), ("qonnx.custom_op.general", "GenericPartition")],
)
def test_operations_of_others_are_not_imported(written, monkeypatch, domain, kind):
    def change(proto):
        node = proto.graph.node[-1]
        node.domain, node.op_type = domain, kind

    path = changed(written[1], change)
    imported = []
    monkeypatch.setattr("importlib.import_module", imported.append)
    with pytest.raises(ValueError, match=f"operation {kind} of '{domain}' is not known"):
        check_operations(onnx.load(path))
    assert imported == []
    monkeypatch.undo()
    with pytest.raises(UserError, match="qonnx cannot read it"):
        FileHere(path, "qonnx")
    with pytest.raises(UserError, match=r"qonnx cannot run it .its operation"):
        FileApart(path, "qonnx")


def test_operations_within_a_branch_count(written):
    def change(proto):
        inner = onnx.helper.make_graph(
            [onnx.helper.make_node("X", ["a"], ["b"], domain="antigravity")], "inner", [], []
        )
        proto.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=inner))

    with pytest.raises(ValueError, match="operation X of 'antigravity'"):
        check_operations(onnx.load(changed(written[1], change)))


def test_names_of_datatypes():
    ranges = [(0, 1), (0, 3), (0, 4), (0, 255), (-1, 1), (-2, 1), (-3, 3), (-128, 127), (-255, 255)]
    names = ["UINT1", "UINT2", "UINT3", "UINT8", "INT2", "INT2", "INT3", "INT8", "INT9"]
    assert [datatype_of(*x) for x in ranges] == names
