import resource

import pytest
import torch
from export_helpers import quantized_network

from adq_train.deploy.onnx import OnnxModel, onnx_bytes
from adq_train.deploy.onnx_apart import OnnxApart
from adq_train.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def content():
    return onnx_bytes(quantized_network(bits=3)[1])


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
    apart, own = OnnxApart(path), OnnxModel(path)
    assert apart.facts == own.facts()
    for size in (1, 5):
        images = torch.randn(size, 1, 8, 8)
        assert torch.equal(apart(images), own(images))


def test_a_graph_with_other_shapes_than_it_says_is_refused(content, tmp_path):
    path = tmp_path / "model.onnx"
    proto = onnx.load_from_string(content)
    entry = proto.metadata_props[0]
    for old, new in (("[1, 8, 8]", "[1, 8, 9]"), ('"num_classes": 10', '"num_classes": 11')):
        entry.value, before = entry.value.replace(old, new), entry.value
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(UserError, match="its metadata say"):
            OnnxApart(path)
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
            OnnxApart(path)(torch.zeros(1, 1, 8, 8))
    path = graph(
        tmp_path / "long.onnx", cases[1], ("n", "m"), [numbers("size", [1, (1 << 20) + 1])]
    )
    with pytest.raises(UserError, match="answers with 1,048,577 values"):
        OnnxApart(path)(torch.zeros(1, 1, 8, 8))
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
            OnnxApart(model(location))
    assert OnnxApart(model("values"))(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_an_operation_that_is_not_built_in_is_refused(tmp_path):
    nodes = [("Run", ["images"], ["logits"], {"domain": "somebody"})]
    with pytest.raises(UserError, match="cannot run it"):
        OnnxApart(graph(tmp_path / "m.onnx", nodes))


def test_a_crash_is_an_error(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    apart = OnnxApart(path)
    apart.process.kill()
    with pytest.raises(UserError, match=r"ended without an answer \(SIGKILL\)"):
        apart(torch.zeros(1, 1, 8, 8))
