import resource

import numpy as np
import pytest
import torch
from export_helpers import quantized_network

from adq_train.data.base import InputFormat
from adq_train.deploy import apart
from adq_train.deploy.apart import FileApart, FileHere
from adq_train.deploy.onnx import onnx_bytes
from adq_train.deploy.runtimes import RUNTIMES
from adq_train.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def content():
    return onnx_bytes(quantized_network(bits=3)[1])


def apart_of(path):
    return apart.FileApart(path, "onnxruntime")


def graph(path, nodes, outputs=("n", 10), constants=(), inputs=("n", 1, 8, 8)):
    """Writes a model from ``images`` to ``logits``."""
    value = onnx.helper.make_tensor_value_info
    made = onnx.helper.make_graph(
        [onnx.helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "g",
        [value("images", onnx.TensorProto.FLOAT, inputs)],
        [value("logits", onnx.TensorProto.FLOAT, outputs)],
        constants,
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(made, opset_imports=opset, ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def numbers(name, values):
    return onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values)


def test_it_answers_as_within_this_process(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    other, own = apart_of(path), FileHere(path, "onnxruntime")
    for size in (1, 5):
        images = torch.randn(size, 1, 8, 8)
        assert torch.equal(other(images), own(images))


def test_a_file_that_computes_for_ever_is_ended(content, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    monkeypatch.setattr(apart, "START", "import time; time.sleep(60)")
    monkeypatch.setattr(apart, "MOST_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"has not answered within 0\.3 s and was ended; try a sm"):
        apart_of(path)


def test_a_graph_with_other_shapes_than_it_says_is_refused(content, tmp_path):
    path = tmp_path / "model.onnx"
    proto = onnx.load_from_string(content)
    entry = proto.metadata_props[0]
    for old, new in (("[1, 8, 8]", "[1, 8, 9]"), ('"num_classes": 10', '"num_classes": 11')):
        entry.value, before = entry.value.replace(old, new), entry.value
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(UserError, match="its metadata say"):
            apart_of(path)
        entry.value = before


def test_what_it_takes_has_a_limit(tmp_path):
    """A constant of 64 GB, an answer of 64 GB for an image, and a long one."""
    size = numbers("size", [1, 1 << 34])
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
    mean = ("ReduceMean", ["images"], ["mean"], {"keepdims": 0})
    cases = [
        [("ConstantOfShape", ["size"], ["big"]), mean, ("Add", ["big", "mean"], ["logits"])],
        [mean, ("Expand", ["mean", "size"], ["logits"])],
    ]
    for number, nodes in enumerate(cases):
        path = graph(tmp_path / f"{number}.onnx", nodes, ("n", "m"), [size, one])
        with pytest.raises(UserError, match=r"onnxruntime (cannot run it|ended without)"):
            apart_of(path)(torch.zeros(1, 1, 8, 8))
    path = graph(
        tmp_path / "long.onnx", cases[1], ("n", "m"), [numbers("size", [1, (1 << 20) + 1])]
    )
    with pytest.raises(UserError, match="answers with 1,048,577 values"):
        apart_of(path)(torch.zeros(1, 1, 8, 8))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak < 4_000_000  # kilobytes


def test_values_are_read_from_plain_files_beside_it_alone(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(40))
    (tmp_path / "in" / "values").write_bytes(bytes(40))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")

    def model(location):
        values = onnx.TensorProto(name="values", data_type=onnx.TensorProto.FLOAT, dims=[1, 10])
        values.data_location = onnx.TensorProto.EXTERNAL
        values.external_data.add(key="location", value=location)
        values.external_data.add(key="length", value="40")
        mean = ("ReduceMean", ["images"], ["mean"], {"keepdims": 0})
        add = ("Add", ["mean", "values"], ["logits"])
        return graph(tmp_path / "in" / "m.onnx", [mean, add], ("a", 10), [values])

    for location in ("../secret", str(tmp_path / "secret"), "link", "", "missing"):
        with pytest.raises(UserError, match=r"keeps values in|cannot run it"):
            apart_of(model(location))
    assert apart_of(model("values"))(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_an_operation_that_is_not_built_in_is_refused(tmp_path):
    nodes = [("Run", ["images"], ["logits"], {"domain": "somebody"})]
    with pytest.raises(UserError, match="cannot run it"):
        apart_of(graph(tmp_path / "m.onnx", nodes))


def test_a_crash_is_an_error(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    apart = apart_of(path)
    apart.process.kill()
    with pytest.raises(UserError, match=r"ended without an answer \(SIGKILL\)"):
        apart(torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def integers():
    """A linear layer on (2, 4, 4), with what it says about itself."""
    from tflite_helpers import IMAGES

    from adq_train.deploy.tflite_file import Program, file_bytes
    from adq_train.deploy.tflite_ops import Emitter, Target, Weighted

    emitter = Emitter()
    images = emitter.input("images", (1, 4, 4, 2))
    layer = Weighted(np.arange(-48, 48).reshape(3, 32), np.full(3, 0.01), None)
    flat = emitter.flatten(emitter.rescale(images, IMAGES, "codes"), "flat")
    output = emitter.output(emitter.linear(flat, layer, Target("fc", None)), "logits")
    program = Program(tuple(emitter.operations), images.value, output)

    def write(path, shape=(2, 4, 4), num_classes=3):
        expects = InputFormat(num_classes, shape).to_dict()
        path.write_bytes(file_bytes(program, {"input": expects, "data": {"name": "x"}}))
        return path

    return write


@pytest.mark.parametrize("runtime", ["LiteRT", "TensorFlow Lite Micro"])
def test_tflite_files_too(integers, tmp_path, runtime):
    for package in RUNTIMES[runtime].packages:
        pytest.importorskip(package)
    path = integers(tmp_path / "m.tflite")
    apart, here = FileApart(path, runtime), FileHere(path, runtime)
    assert apart.expects == InputFormat(3, (2, 4, 4))
    assert apart.facts["data"] == {"name": "x"}
    for size in (1, 5, 5, 2):
        images = torch.randn(size, 2, 4, 4)
        logits = apart(images)
        assert torch.equal(logits, here(images))
        assert logits.shape == (size, 3)
        assert logits.std() > 0.1
    for other in ({"shape": (2, 4, 5)}, {"shape": (4, 4, 2)}, {"num_classes": 4}):
        with pytest.raises(UserError, match="its metadata say"):
            FileApart(integers(tmp_path / "other.tflite", **other), runtime)
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2], b"\xff" * 999):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{runtime} (cannot run it|ended without)"):
            FileApart(path, runtime)
