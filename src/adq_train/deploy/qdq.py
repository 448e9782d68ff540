"""ONNX with int8 weights and uint8 activations, in the pattern that runtimes fuse (QDQ).

Each layer stands between DequantizeLinear and QuantizeLinear; what hands integers on as they are
(max pools, slices, zero padding, flattening) works on the integers.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from adq_train.deploy.formats import Source, Written, require
from adq_train.deploy.integer import (
    IntegerLayer,
    IntegerLinear,
    Rescale,
    integer_graph,
    integer_network,
)
from adq_train.deploy.onnx import with_facts
from adq_train.errors import UserError
from adq_train.quantization.graph import Operation, pair, place, shape_of

OPSET, IR_VERSION = 18, 10
# What onnxruntime calls layers that it computes in float.
FLOAT_LAYERS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def write(source: Source) -> Written:
    """The content of the file, and how many of its layers onnxruntime computes in integers."""
    network = integer_network(source.network)
    content = with_facts(QdqGraph(network, source.example).model(), source.tables)
    kinds = optimized_kinds(content)
    floats = sum(kinds[x] for x in FLOAT_LAYERS)
    layers = sum(isinstance(x, IntegerLayer) for x in network.modules())
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return Written(
        content,
        network,
        remarks=(
            f"onnxruntime computes {layers - floats} of {layers} layers in integers here ({found})",
        ),
    )


def optimized_kinds(content: bytes) -> Counter[str]:
    """How often each operation is in the graph that onnxruntime makes of a model here."""
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # it warns that such a file is for this machine alone
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        model = require("onnx").load(options.optimized_model_filepath)
    return Counter(x.op_type for x in model.graph.node)


@dataclass(frozen=True)
class Value:
    """A tensor of the ONNX graph.

    Attributes:
        name: Of the tensor.
        step: Of its codes, or None for float values.
        zero_point: The code of 0.
    """

    name: str
    step: float | None = None
    zero_point: int = 0


class QdqGraph:
    """Writes an integer network's operations, one after the other.

    Args:
        network: From :func:`~.integer.integer_network`.
        example: Inputs (N, …); N is free in the file.
    """

    def __init__(self, network: fx.GraphModule, example: Tensor) -> None:
        self.helper = require("onnx").helper
        self.numpy = require("onnx").numpy_helper
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.values: dict[fx.Node, Value] = {}
        self.graph = integer_graph(network)
        module = fx.GraphModule(network, self.graph.fx)
        ShapeProp(module).propagate(torch.cat([example[:1]] * 2))
        self.example = example
        for node in self.graph:
            self._write(node, self.graph.operation(node))

    def _write(self, node: fx.Node, operation: Operation) -> None:
        if operation.kind == "input":
            if self.values:
                raise UserError("format: qdq writes networks that take one tensor")
            self.values[node] = Value("images")
            return
        inputs = [self.values[x] for x in operation.inputs]
        if operation.kind == "output":
            if len(inputs) != 1 or node.args[0] is not operation.inputs[0]:
                raise UserError("format: qdq writes networks that give one tensor")
            self.add("Identity", [self.float(inputs[0])], "logits")
            return
        if operation.kind == "leaf":
            self.values[node] = self._own(node, operation.module, inputs[0])
            return
        writer = WRITERS.get(operation.kind)
        found = writer(self, node, operation, inputs) if writer else None
        if found is None:
            raise UserError(f"format: qdq cannot write {place(node)}, {dict(operation.settings)}")
        self.values[node] = found

    def add(self, kind: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Adds a node; returns the name of its output."""
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        node = self.helper.make_node(kind, list(inputs), [name], name=name, **attributes)
        self.nodes.append(node)
        return name

    def constant(self, array: Any, name: str = "") -> str:
        """Adds an initializer; equal ones without a name are one."""
        array = np.asarray(array)
        name = name or f"constant_{array.dtype}_{'_'.join(map(str, array.flatten()))}"
        self.constants.setdefault(name, self.numpy.from_array(array, name))
        return name

    def float(self, value: Value) -> str:
        """The name of a value as float values."""
        if value.step is None:
            return value.name
        scale = self.constant(np.float32(value.step))
        return self.add("DequantizeLinear", [value.name, scale, self._zero(value)])

    def _zero(self, value: Value) -> str:
        return self.constant(np.uint8(value.zero_point))

    def quantize(self, value: Value, to: Rescale) -> Value:
        """Codes of a value: QuantizeLinear, and a Clip where the codes do not end with a byte.

        Codes of another step go through LeakyRelu, for which onnxruntime looks all 256 up in a
        table: with the slope 0 it is the lower end of the range, and a byte's end the upper one.
        """
        source, recoded = self.float(value), value.step is not None
        last = 255 if recoded or to.low < 0 else to.high
        new = Value("", to.step, last - to.high)
        if recoded:
            source = self.add("LeakyRelu", [source], alpha=float(to.low < 0))
        scale = self.constant(np.float32(to.step))
        name = self.add("QuantizeLinear", [source, scale, self._zero(new)])
        first = to.low + new.zero_point if to.low < 0 else 0
        if (first, last) != (0, 255):
            name = self.add("Clip", [name, *(self.constant(np.uint8(x)) for x in (first, last))])
        return Value(name, new.step, new.zero_point)

    def _own(self, node: fx.Node, module: Any, value: Value) -> Value:
        if isinstance(module, Rescale):
            return self.quantize(value, module)
        name = str(node.target)
        if value.step is None:
            raise UserError(f"format: qdq found float values before {name}")
        weight = self._dequantized(f"{name}.weight", module.codes, module.scale)
        inputs = [self.float(value), weight]
        if module.bias is not None:
            grid = module.scale.double() * value.step
            codes = (module.bias.double() / grid).round().to(torch.int32)
            inputs.append(self._dequantized(f"{name}.bias", codes, grid.float()))
        if isinstance(module, IntegerLinear):
            return Value(self.add("Gemm", inputs, transB=1))
        return Value(
            self.add(
                "Conv",
                inputs,
                kernel_shape=list(module.codes.shape[2:]),
                strides=list(module.stride),
                pads=[*module.padding, *module.padding],
                dilations=list(module.dilation),
                group=module.groups,
            )
        )

    def _dequantized(self, name: str, codes: Tensor, scale: Tensor) -> str:
        """Constant codes (C, …) with a scale for each channel, as float values."""
        values = [
            self.constant(codes.numpy(), name),
            self.constant(scale.numpy(), f"{name}.scale"),
            self.constant(torch.zeros_like(scale, dtype=codes.dtype).numpy(), f"{name}.zero"),
        ]
        return self.add("DequantizeLinear", values, axis=0)

    def model(self) -> Any:
        """The model, with input ``images`` (N, …) and output ``logits``; N is free."""
        helper, kind = self.helper, require("onnx").TensorProto.FLOAT
        classes = next(x for x in self.graph if x.op == "output").all_input_nodes[0]
        ends = [
            helper.make_tensor_value_info(name, kind, ["batch", *shape[1:]])
            for name, shape in (("images", self.example.shape), ("logits", shape_of(classes)))
        ]
        constants = list(self.constants.values())
        graph = helper.make_graph(self.nodes, "adq_train", ends[:1], ends[1:], constants)
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)


Write = Callable[[QdqGraph, fx.Node, Operation, list[Value]], Value | None]


def _max_pool(q: QdqGraph, node: fx.Node, of: Operation, inputs: list[Value]) -> Value:
    name = q.add("MaxPool", [inputs[0].name], **_window(of.settings),
                 dilations=pair(of.settings["dilation"]))  # fmt: skip
    return Value(name, inputs[0].step, inputs[0].zero_point)


def _avg_pool(q: QdqGraph, node: fx.Node, of: Operation, inputs: list[Value]) -> Value | None:
    if of.settings["divisor_override"]:
        return None
    counts = int(bool(of.settings["count_include_pad"]))
    name = q.add("AveragePool", [q.float(inputs[0])], **_window(of.settings),
                 count_include_pad=counts)  # fmt: skip
    return Value(name)


def _window(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that pools have in common."""
    size, padding = pair(settings["kernel_size"]), pair(settings["padding"])
    return {
        "kernel_shape": size,
        "strides": pair(settings["stride"] or size),
        "pads": [*padding, *padding],
        "ceil_mode": int(settings["ceil_mode"]),
    }


def _adaptive(q: QdqGraph, node: fx.Node, of: Operation, inputs: list[Value]) -> Value | None:
    before, after = (shape_of(x)[2:] for x in (of.inputs[0], node))
    if before == after:
        return inputs[0]
    if after == (1, 1):
        return Value(q.add("GlobalAveragePool", [q.float(inputs[0])]))
    if any(x % y for x, y in zip(before, after, strict=True)):
        return None
    size = [x // y for x, y in zip(before, after, strict=True)]
    return Value(q.add("AveragePool", [q.float(inputs[0])], kernel_shape=size, strides=size))


def _flatten(q: QdqGraph, node: fx.Node, of: Operation, inputs: list[Value]) -> Value | None:
    rank = len(shape_of(of.inputs[0]))
    if of.settings["start_dim"] != 1 or of.settings["end_dim"] not in (-1, rank - 1):
        return None
    value = inputs[0]
    return Value(q.add("Flatten", [value.name], axis=1), value.step, value.zero_point)


def _slice(q: QdqGraph, node: fx.Node, of: Operation, inputs: list[Value]) -> Value | None:
    index = of.settings["index"]
    parts = dict(enumerate(index if isinstance(index, tuple) else (index,)))
    parts = {axis: x for axis, x in parts.items() if x != slice(None)}
    if 0 in parts or not all(type(x) in (int, type(None)) for s in parts.values()
                             for x in (s.start, s.stop, s.step)):  # fmt: skip
        return None
    ends = [np.iinfo(np.int64).max if x.stop is None else x.stop for x in parts.values()]
    arguments = [[x.start or 0 for x in parts.values()], ends, list(parts),
                 [x.step or 1 for x in parts.values()]]  # fmt: skip
    value = inputs[0]
    names = [q.constant(np.array(x, np.int64)) for x in arguments]
    return Value(q.add("Slice", [value.name, *names]), value.step, value.zero_point)


def _pad(q: QdqGraph, node: fx.Node, of: Operation, inputs: list[Value]) -> Value:
    value, pairs = inputs[0], list(of.settings["pad"])
    rank = len(shape_of(of.inputs[0]))
    pairs = pairs + [0] * (2 * rank - len(pairs))
    before, after = pairs[0::2][::-1], pairs[1::2][::-1]
    zero = np.uint8(value.zero_point) if value.step is not None else np.float32(0)
    names = [q.constant(np.array([*before, *after], np.int64)), q.constant(zero)]
    return Value(q.add("Pad", [value.name, *names]), value.step, value.zero_point)


def _batch_norm(q: QdqGraph, node: fx.Node, of: Operation, inputs: list[Value]) -> Value:
    norm: Any = of.module
    ones = torch.ones_like(norm.running_var)
    tensors = {
        "gain": ones if norm.weight is None else norm.weight,
        "offset": 0 * ones if norm.bias is None else norm.bias,
        "mean": norm.running_mean,
        "variance": norm.running_var,
    }
    names = [q.constant(x.detach().numpy(), f"{node.target}.{k}") for k, x in tensors.items()]
    return Value(q.add("BatchNormalization", [q.float(inputs[0]), *names], epsilon=norm.eps))


WRITERS: dict[str, Write] = {
    "relu": lambda q, _, of, x: Value(q.add("Relu", [q.float(x[0])])),
    "relu6": lambda q, _, of, x: Value(
        q.add("Clip", [q.float(x[0]), *(q.constant(np.float32(end)) for end in (0, 6))])
    ),
    "add": lambda q, _, of, x: Value(q.add("Add", [q.float(y) for y in x])),
    "cat": lambda q, _, of, x: Value(
        q.add("Concat", [q.float(y) for y in x], axis=of.settings["dim"])
    ),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive,
    "flatten": _flatten,
    "slice": _slice,
    "pad": _pad,
    "batch_norm": _batch_norm,
}
