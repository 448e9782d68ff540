"""A network's graph in QONNX: MultiThreshold nodes, integer weights, scales behind the sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from adq_train.deploy.formats import require
from adq_train.deploy.integers import counted, integer_grid
from adq_train.deploy.layer_tables import Staircase, staircase
from adq_train.deploy.model import TableModel, assemble
from adq_train.deploy.onnx_checks import DOMAIN
from adq_train.deploy.packed_layers import PackedLayer, PackedSubclass, Rescale, Steps
from adq_train.deploy.qonnx_runtime import EXTRA
from adq_train.errors import UserError
from adq_train.quantization.graph import Graph, Operation, pair, place, shape_of
from adq_train.quantization.layers import float_kind

# The newest opset that FINN's and hls4ml's transformations are written for.
OPSET, IR_VERSION = 13, 8


def qonnx_proto(model: TableModel, network: nn.Module, example: Tensor) -> Any:
    """The graph as an ONNX model for one image, with every tensor's shape and datatype.

    Args:
        model: The tables; batch norms folded where they can be.
        network: The architecture that they belong to.
        example: Inputs (N, …).

    Raises:
        UserError: The package qonnx is missing, or the graph has an operation that is not known.
    """
    wrapper = require("qonnx.core.modelwrapper", EXTRA).ModelWrapper
    datatypes = require("qonnx.core.datatype", EXTRA).DataType
    network = assemble(model, network=network)
    walk = _Walk(network, model, example[:1])
    proto = wrapper(walk.proto())
    for name, datatype in walk.datatypes.items():
        proto.set_tensor_datatype(name, datatypes[datatype])
    for name in ("infer_shapes.InferShapes", "infer_datatypes.InferDataTypes"):
        module, _, kind = name.partition(".")
        proto = proto.transform(getattr(require(f"qonnx.transformation.{module}", EXTRA), kind)())
    return proto.model


def datatype_of(smallest: int, largest: int) -> str:
    """QONNX's name for the narrowest integers that hold a range."""
    if smallest >= 0:
        return f"UINT{max(largest.bit_length(), 1)}"
    return f"INT{max((-smallest - 1).bit_length(), largest.bit_length()) + 1}"


# What hands values on as they are, and what gives a step back that its operand had.
CHOICES = ("max_pool", "flatten", "slice")
LINEAR = (*CHOICES, "relu", "pad", "avg_pool", "adaptive_avg_pool", "mean")


def thresholds_apart(graph: Graph) -> None:
    """Gives each packed layer's thresholds a node of their own, in place, as early as they can be.

    Max pools, flattenings and slices choose among values, so that thresholds may stand before them.
    """
    for node in graph:
        if isinstance(_module(graph, node), PackedLayer):
            with graph.fx.inserting_before(node):
                steps = graph.fx.call_module(f"{node.target}.steps", (node.args[0],))
            node.args = (steps,)
    for node in graph:
        while _is_threshold(graph, node):
            (source,) = node.all_input_nodes
            operation = graph.operation(source)
            if operation.kind not in CHOICES or len(source.users) > 1:
                break
            (before,) = operation.inputs
            node.replace_all_uses_with(source)
            source.replace_input_with(before, node)
            node.args = (before,)
            source.prepend(node)
    graph.fx.lint()


def _module(graph: Graph, node: fx.Node) -> nn.Module | None:
    return graph.module(node) if node.op == "call_module" else None


def _is_threshold(graph: Graph, node: fx.Node) -> bool:
    return isinstance(_module(graph, node), Steps | Rescale)


class _Edge:
    """A Rescale as a quantizer of inputs, whose steps can be read off.

    Args:
        rescale: Quantizes a value between layers.
    """

    bit_width = 8

    def __init__(self, rescale: Rescale) -> None:
        self.rescale = rescale

    def __call__(self, x: Tensor) -> Tensor:
        """Fake-quantized values of the same shape."""
        return cast(Tensor, self.rescale(x))

    def levels(self) -> Tensor:
        """All levels, ascending."""
        return torch.arange(self.rescale.low, self.rescale.high + 1) * self.rescale.step


@dataclass(frozen=True)
class Value:
    """What a node gives: a tensor times a step, or, without one, the tensor itself."""

    name: str
    step: float | None = None


class _Walk:
    """One node after the other.

    Attributes:
        datatypes: Of the tensors that hold integers.
    """

    def __init__(self, network: nn.Module, model: TableModel, image: Tensor) -> None:
        self.helper = require("onnx").helper
        self.graph = Graph(network, (PackedLayer, PackedSubclass, Rescale, Steps))
        thresholds_apart(self.graph)
        ShapeProp(fx.GraphModule(network, self.graph.fx)).propagate(image)
        self.weights = {network.get_submodule(k): x.weight for k, x in model.layers.items()}
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        self.values: dict[fx.Node, Value] = {}
        self.scaled_values: dict[Value, str] = {}
        self.datatypes: dict[str, str] = {}
        self.image = tuple(image.shape)

    def proto(self) -> Any:
        """The whole, with inputs ``images`` and outputs ``logits``."""
        helper, float32 = self.helper, 1
        result: tuple[int, ...] = ()
        for node in self.graph:
            operation = self.graph.operation(node)
            if operation.kind == "output":
                (last,) = operation.inputs
                result = shape_of(last)
                self.rename(self.real(last), "logits")
            elif operation.kind == "input":
                self.values[node] = Value("images")
            else:
                self.values[node] = self.emit(node, operation)
        arrays = require("onnx").numpy_helper
        graph = helper.make_graph(
            self.nodes,
            "adq_train",
            [helper.make_tensor_value_info("images", float32, self.image)],
            [helper.make_tensor_value_info("logits", float32, result)],
            [arrays.from_array(array, name) for name, array in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def add(self, kind: str, inputs: Sequence[str], output: str, **settings: Any) -> str:
        """Appends a node with one output, and gives that."""
        self.nodes.append(self.helper.make_node(kind, inputs, [output], output, **settings))
        return output

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor that a node makes another name."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [new if x == old else x for x in names]
        if old in self.datatypes:
            self.datatypes[new] = self.datatypes.pop(old)

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """An initialiser; one that is there already is the same."""
        self.constants[name] = np.ascontiguousarray(values, dtype)
        return name

    def real(self, node: fx.Node) -> str:
        """The tensor of a node's values, multiplied by their step where they have one."""
        value = self.values[node]
        if value.step is None:
            return value.name
        if value not in self.scaled_values:
            name = self.scaled(value.name, f"{value.name}_scaled", value.step)
            self.scaled_values[value] = name
        return self.scaled_values[value]

    def emit(self, node: fx.Node, operation: Operation) -> Value:
        """Appends what a node does.

        Raises:
            UserError: It is not known; it is named.
        """
        module = operation.module
        if isinstance(module, Steps):
            return self.thresholds(node, module.stairs)
        if isinstance(module, Rescale):
            # Its ties go to even codes: its steps are found as those of any quantizer are.
            return self.thresholds(node, staircase(cast(Any, _Edge(module))))
        if isinstance(module, PackedLayer):
            return self.layer(node, module)
        if operation.kind == "layer":
            return self.float_layer(node, module)
        if operation.kind == "batch_norm":
            return self.batch_norm(node, module)
        first = operation.inputs[0] if operation.inputs else node
        if operation.kind == "identity" or self.is_absorbed(node):
            return self.values[first]
        found = None
        if operation.kind != "other":  # what that gives need not be a tensor, with a shape
            found = _simple(operation, shape_of(first), shape_of(node))
        if found is None:
            raise UserError(
                f"format: qonnx does not know {place(node)}; it knows convolutions, linear layers, "
                "batch norms, relu, relu6, pools, mean, flatten, slices, zero padding, dropout, "
                "additions and concatenations; use format=onnx"
            )
        keeps = operation.kind in LINEAR
        step = self.values[first].step if keeps else None
        value = [self.values[first].name] if keeps else [self.real(x) for x in operation.inputs]
        for number, (kind, constants, settings) in enumerate(found):
            name = node.name if number + 1 == len(found) else f"{node.name}_{number}"
            more = [
                self.constant(f"{name}_{key}", x, np.float32 if isinstance(x, float) else np.int64)
                for key, x in constants
            ]
            value = [self.add(kind, [*value, *more], name, **settings)]
        return Value(value[0], step)

    def is_absorbed(self, node: fx.Node) -> bool:
        """Whether a node is a ReLU, and thresholds after it do what it does."""
        is_relu = self.graph.operation(node).kind == "relu"
        return is_relu and all(_is_threshold(self.graph, x) for x in node.users)

    def thresholds(self, node: fx.Node, stairs: Staircase) -> Value:
        """A staircase: integers, and their step."""
        (source,) = node.all_input_nodes
        found = counted(stairs, self.is_absorbed(source))
        name = f"{node.name.removesuffix('_steps')}_codes"
        datatype = datatype_of(found.first, found.last)
        self.datatypes[name] = datatype
        self.add(
            "MultiThreshold",
            [self.real(source), self.constant(f"{name}_thresholds", found.values[None].numpy())],
            name,
            domain=DOMAIN,
            out_dtype=datatype,
            out_scale=1.0,
            out_bias=float(found.first),
        )
        return Value(name, found.step)

    def scaled(self, value: str, name: str, factors: Any, offsets: Any = None) -> str:
        """A tensor times factors, plus offsets; scalars, or shaped for its channels."""
        factors = np.asarray(factors, np.float64)
        if (factors == factors.flat[0]).all():
            factors = factors.flat[:1]  # one factor moves past more than many do
        last = name if offsets is None else f"{name}_mul"
        value = self.add("Mul", [value, self.constant(f"{name}_scale", factors)], last)
        if offsets is None:
            return value
        return self.add("Add", [value, self.constant(f"{name}_bias", offsets)], name)

    def layer(self, node: fx.Node, module: PackedLayer) -> Value:
        """A quantized layer: a sum of integers, a scale and a bias."""
        table, of = self.weights[module], module.layer
        source = self.values[node.all_input_nodes[0]]
        grid = integer_grid(table.codebook)
        weight = grid.integers[table.codes.long()].numpy()
        name = f"{node.target}.weight"
        self.datatypes[name] = datatype_of(int(weight.min()), int(weight.max()))
        sums = self.product(node, of, source.name, weight, f"{node.name}_sums")
        factors = torch.full((len(weight),), (source.step or 1.0) * grid.step, dtype=torch.float64)
        if table.scale is not None:
            factors = factors * table.scale.double()
        shape = _channels(of, weight)
        bias = _values(of.bias, shape)
        return Value(self.scaled(sums, node.name, factors.view(shape).numpy(), bias))

    def float_layer(self, node: fx.Node, of: Any) -> Value:
        """A layer that stays float."""
        value, weight = self.real(node.all_input_nodes[0]), of.weight.detach().numpy()
        if of.bias is None:
            return Value(self.product(node, of, value, weight, node.name))
        sums = self.product(node, of, value, weight, f"{node.name}_sums")
        bias = self.constant(f"{node.target}.bias", _values(of.bias, _channels(of, weight)))
        return Value(self.add("Add", [sums, bias], node.name))

    def product(self, node: fx.Node, of: Any, value: str, weight: Any, output: str) -> str:
        """The sums of a convolution or of a linear layer, without its bias."""
        name = f"{node.target}.weight"
        if isinstance(of, nn.Linear):
            return self.add("MatMul", [value, self.constant(name, weight.T)], output)
        known = isinstance(of, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not known or of.padding_mode != "zeros":
            padding = f" with padding_mode={of.padding_mode}" if known else ""
            raise UserError(
                f"format: qonnx has Conv1d, Conv2d, Conv3d with zero padding, and Linear layers; "
                f"{place(node)} is a {float_kind(of).__name__}{padding}; use format=onnx"
            )
        before, after = _padding(of)
        return self.add(
            "Conv",
            [value, self.constant(name, weight)],
            output,
            kernel_shape=of.kernel_size,
            strides=of.stride,
            pads=[*before, *after],
            dilations=of.dilation,
            group=of.groups,
        )

    def batch_norm(self, node: fx.Node, norm: Any) -> Value:
        """A batch norm that no layer takes, as factors and offsets of channels."""
        if norm.running_var is None:
            raise UserError(f"format: {place(node)} keeps no statistics; qonnx cannot express it")
        gain = (norm.running_var.double() + norm.eps).rsqrt()
        gain = gain if norm.weight is None else gain * norm.weight
        offset = -norm.running_mean.double() * gain
        offset = offset if norm.bias is None else offset + norm.bias
        shape = (1, -1, *[1] * (len(shape_of(node)) - 2))
        value = self.real(node.all_input_nodes[0])
        return Value(self.scaled(value, node.name, _values(gain, shape), _values(offset, shape)))


def _channels(of: Any, weight: Any) -> tuple[int, ...]:
    """The shape in which a value per channel goes with what a layer gives."""
    return (-1,) if isinstance(of, nn.Linear) else (1, -1, *[1] * (weight.ndim - 2))


def _values(tensor: Any, shape: tuple[int, ...]) -> Any:
    return None if tensor is None else tensor.detach().view(shape).numpy()


def _padding(of: Any) -> tuple[list[int], list[int]]:
    """Zeros before and after, per dimension."""
    if of.padding == "valid":
        return [0] * len(of.kernel_size), [0] * len(of.kernel_size)
    if of.padding == "same":
        both = [d * (k - 1) for d, k in zip(of.dilation, of.kernel_size, strict=True)]
        return [x // 2 for x in both], [x - x // 2 for x in both]
    return list(of.padding), list(of.padding)


Step = tuple[str, list[tuple[str, Any]], dict[str, Any]]


def _simple(
    operation: Operation, source: tuple[int, ...], result: tuple[int, ...]
) -> list[Step] | None:
    """ONNX's nodes for an operation without weights: kinds, constants, settings; None: not known.

    Args:
        operation: The operation.
        source: Shape of its first operand.
        result: Shape of what it gives.
    """
    kind, settings = operation.kind, operation.settings
    plain = {"relu": "Relu", "add": "Add"}
    if kind in plain:
        return [(plain[kind], [], {})]
    if kind == "relu6":
        return [("Clip", [("lowest", 0.0), ("highest", 6.0)], {})]
    if kind == "cat":
        return [("Concat", [], {"axis": settings["dim"] % len(source)})]
    if kind == "flatten" and len(result) == 2 and settings["start_dim"] == 1:
        return [("Flatten", [], {"axis": 1})]
    if kind in ("adaptive_avg_pool", "mean") and _is_global(operation, source):
        steps: list[Step] = [("GlobalAveragePool", [], {})]
        return steps if len(result) > 2 else [*steps, ("Flatten", [], {"axis": 1})]
    if kind in ("max_pool", "avg_pool"):
        return _pool(kind, settings)
    if kind == "pad":
        sides = [*settings["pad"], *[0] * (2 * len(source) - len(settings["pad"]))]
        pads = [*sides[0::2][::-1], *sides[1::2][::-1]]
        return [("Pad", [("pads", pads)], {})]
    if kind == "slice":
        return _slice(settings["index"])
    return None


def _is_global(operation: Operation, source: tuple[int, ...]) -> bool:
    """Whether an average is one of whole images."""
    if operation.kind == "mean":
        dims = operation.settings["dim"] or ()
        return sorted(x % len(source) for x in dims) == list(range(2, len(source)))
    size = operation.settings["output_size"]
    return set(size if isinstance(size, tuple | list) else (size,)) == {1}


def _pool(kind: str, settings: Any) -> list[Step] | None:
    """A pooling over windows."""
    kernel, padding = pair(settings["kernel_size"]), pair(settings["padding"])
    stride = pair(settings["stride"]) if settings["stride"] else kernel
    if settings["ceil_mode"] or settings.get("divisor_override"):
        return None
    window = {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding]}
    if kind == "max_pool":
        return [("MaxPool", [], {**window, "dilations": pair(settings["dilation"])})]
    counted_in = int(settings["count_include_pad"])
    return [("AveragePool", [], {**window, "count_include_pad": counted_in})]


def _slice(index: Any) -> list[Step] | None:
    """x[a:b:c, …], with steps forwards and bounds that do not count from the end."""
    parts = index if isinstance(index, tuple) else (index,)
    rows = [
        (axis, x.start or 0, np.iinfo(np.int32).max if x.stop is None else x.stop, x.step or 1)
        for axis, x in enumerate(parts)
        if x != slice(None)
    ]
    if not rows:
        return [("Identity", [], {})]
    axes, starts, ends, steps = map(list, zip(*rows, strict=True))
    constants = [("starts", starts), ("ends", ends), ("axes", axes), ("steps", steps)]
    return [("Slice", constants, {})]
