import collections
import sys

import pytest
import torch
from export_helpers import quantized_network
from torch import nn

from adq_train.deploy.apart import FileApart, FileHere
from adq_train.deploy.layer_tables import Staircase
from adq_train.deploy.model import assemble
from adq_train.deploy.onnx import OnnxSteps, onnx_bytes, onnx_network
from adq_train.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    # Two kinds of layers: few thresholds and many.
    network, model = quantized_network(bits=3)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path.write_bytes(onnx_bytes(model))
    return network, model, path


def test_onnxruntime_agrees_at_any_batch_size(exported):
    network, _, path = exported
    runtime = FileHere(path, "onnxruntime")
    for size in (1, 2, 7):
        images = torch.randn(size, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(runtime(images), network(images), rtol=1e-4, atol=1e-4)


def test_the_file_holds_codes_and_no_float_weights(exported):
    _, model, path = exported
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    stored = collections.defaultdict(list)
    for tensor in proto.graph.initializer:
        stored[tensor.data_type].append(tuple(tensor.dims))
    shapes = [tuple(x.weight.codes.shape) for x in model.layers.values()]
    assert sorted(stored[onnx.TensorProto.UINT8]) == sorted(shapes)
    floats = stored[onnx.TensorProto.FLOAT]
    assert not set(shapes) & set(floats)
    largest = max(tensor.numel() for tensor in model.floats.values())
    assert max(torch.Size(dims).numel() for dims in floats) <= max(largest, 8)


def test_only_operations_of_the_standard_are_used(exported):
    proto = onnx.load(exported[2])
    assert {entry.domain for entry in proto.opset_import} <= {"", "ai.onnx"}
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert not proto.functions


def test_what_the_model_expects_travels_along(exported):
    _, model, path = exported
    facts = FileApart(path, "onnxruntime").facts
    assert facts["data"] == model.data
    assert facts["input"]["image_shape"] == [1, 8, 8]


@pytest.mark.parametrize(
    ("bits", "levels", "uniform"), [(2, 2, False), (4, 16, False), (5, 20, True), (8, 256, False)]
)
def test_staircases_are_exact_in_onnxruntime(small, tmp_path, bits, levels, uniform, monkeypatch):
    values = torch.arange(float(levels)) if uniform else torch.randn(levels).sort().values
    stairs = Staircase(bits, torch.randn(levels - 1).sort().values, values)
    _, model = small
    monkeypatch.setattr("adq_train.deploy.onnx.onnx_network", lambda *_: OnnxSteps(stairs))
    path = tmp_path / "steps.onnx"
    path.write_bytes(onnx_bytes(model))
    x = torch.cat([torch.randn(4000), stairs.thresholds])
    x = nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 1, 8, 8)
    expected = values[torch.bucketize(x, stairs.thresholds)]
    assert torch.equal(FileHere(path, "onnxruntime")(x), expected)


def test_the_network_is_the_packed_one_before_export(exported):
    network, model, _ = exported
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(onnx_network(model)(images), network(images))
        assert torch.equal(assemble(model)(images), network(images))


def test_a_missing_package_says_how_to_get_it(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs the package onnxscript; .*adq-train\[export\]"):
        onnx_bytes(small[1])


def test_a_model_that_cannot_be_exported_is_an_error(small, monkeypatch):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    monkeypatch.setattr("adq_train.deploy.onnx.onnx_network", lambda *_: Branching())
    with pytest.raises(UserError, match="cannot export this model"):
        onnx_bytes(small[1])


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.onnx"
    with pytest.raises(UserError, match="there is no file"):
        FileApart(path, "onnxruntime")
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="onnxruntime cannot read it"):
        FileHere(path, "onnxruntime")
