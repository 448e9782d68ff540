import json

import numpy as np
import pytest
from tflite_helpers import LITERT, run_file

from adq_train.deploy.tflite_file import METADATA_KEY, Operation, Program, Value, file_bytes

schema = pytest.importorskip("ai_edge_litert.schema_py_generated")


@pytest.fixture(scope="module")
def content():
    """A linear layer with a scale for each of three channels, in int8; x of shape (N, 4)."""
    x = Value("x", (1, 4), "float32")
    codes = Value("codes", (1, 4), "int8", np.float32(0.5), 27)
    scale = np.array([0.25, 0.5, 2.0], np.float32)
    data = np.array([[1, 2, 3, 4], [-1, 0, 0, 0], [0, 0, -127, 127]])
    weight = Value("weight", (3, 4), "int8", scale, 0, 0, data)
    bias = Value("bias", (3,), "int32", 0.5 * scale, data=np.array([100_000, 0, -3]))
    y = Value("y", (1, 3), "int8", np.float32(16.0), 0)
    out = Value("out", (1, 3), "float32")
    operations = (
        Operation("QUANTIZE", 1, (x,), codes),
        Operation("FULLY_CONNECTED", 4, (codes, weight, bias), y, {"keepNumDims": False}),
        Operation("DEQUANTIZE", 2, (y,), out),
    )
    return file_bytes(Program(operations, x, out), {"text": "ä", "number": 3})


def test_it_computes_what_it_says(content):
    x = np.array([[1.0, 0, 0, 0.5], [0, -1.5, 0, 0]], np.float32)
    # (2 + 4 + 100,000) · 0.125 = 12,500.75 and so on, in steps of 16 up to 127 of them.
    exact = np.array([[12500.75, -0.5, 124.0], [12499.25, 0.0, -3.0]])
    assert np.array_equal(run_file(content, x), np.clip(np.rint(exact / 16), -128, 127) * 16)


def test_what_is_known_of_the_model_is_in_its_metadata(content):
    model = schema.ModelT.InitFromPackedBuf(content)
    (entry,) = model.metadata
    assert entry.name.decode() == METADATA_KEY
    facts = json.loads(bytes(model.buffers[entry.buffer].data))
    assert facts == {"text": "ä", "number": 3}


def test_input_and_output_have_names_and_any_number_of_rows(content):
    run = LITERT.Interpreter(model_content=content).get_signature_runner("serving_default")
    assert list(run.get_input_details()["x"]["shape_signature"]) == [-1, 4]
    assert run(x=np.zeros((5, 4), np.float32))["out"].shape == (5, 3)


def test_constants_begin_at_multiples_of_16_bytes(content):
    model = schema.Model.GetRootAs(content)
    seen = 0
    for i in range(model.BuffersLength()):
        data = model.Buffers(i).DataAsNumpy()
        if not isinstance(data, int):
            start = data.__array_interface__["data"][0]
            base = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
            assert (start - base) % 16 == 0
            seen += 1
    assert seen == 3
    assert content[4:8] == b"TFL3"


def test_versions_are_written_for_each_kind(content):
    model = schema.ModelT.InitFromPackedBuf(content)
    codes = schema.BuiltinOperator
    assert [(x.builtinCode, x.version) for x in model.operatorCodes] == [
        (codes.QUANTIZE, 1),
        (codes.FULLY_CONNECTED, 4),
        (codes.DEQUANTIZE, 2),
    ]
