"""A .tflite file from a list of operations; knows the format and nothing about networks.

The schema comes with the interpreter, the extra ``edge``: ``pip install 'adq-train[edge]'``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_train.deploy.formats import METADATA_KEY, require

EXTRA = "edge"
IDENTIFIER = b"TFL3"
# Kernels read buffers with vector instructions; microcontrollers read them where they lie.
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the file, constant or computed.

    Attributes:
        name: For people who look at the file.
        shape: With 1 for the batch.
        dtype: ``int8``, ``int16``, ``int32``, ``int64``, ``uint8`` or ``float32``.
        scale: () or (C,) float32; a stored integer q stands for (q - zero_point) · scale. None:
            not quantized.
        zero_point: The same for all channels.
        axis: Of the channels, where there is a scale for each.
        data: The values of a constant, in any type that holds them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: NDArray[np.float32] | np.float32 | None = None
    zero_point: int = 0
    axis: int = 0
    data: NDArray[Any] | None = None


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        kind: Its name in the schema, or of a custom operation.
        version: The least version of it that has what is asked for.
        inputs: None where an optional one is left out.
        output: What it computes.
        options: Its fields in the schema, by name.
    """

    kind: str
    version: int
    inputs: tuple[Value | None, ...]
    output: Value
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Operations in the order in which they run."""

    operations: tuple[Operation, ...]
    input: Value
    output: Value


# The table of the schema that an operation's options are in.
OPTIONS = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MUL": "MulOptions",
    "PAD": "PadOptions",
    "QUANTIZE": "QuantizeOptions",
    "RESHAPE": "ReshapeOptions",
}


def file_bytes(program: Program, facts: Mapping[str, Any]) -> bytes:
    """The file that holds a program.

    Args:
        program: The operations.
        facts: What is kept in the file's metadata, as JSON.

    Raises:
        UserError: The package with the schema is missing.
    """
    schema = require("ai_edge_litert.schema_py_generated", EXTRA)
    flatbuffers = require("flatbuffers", EXTRA)
    return _Writer(schema, flatbuffers).write(program, facts)


class _Writer:
    """Numbers tensors, buffers and kinds of operations as they come."""

    def __init__(self, schema: Any, flatbuffers: Any) -> None:
        self.schema, self.flatbuffers = schema, flatbuffers
        self.buffers: list[Any] = [schema.BufferT()]  # the first is everybody's empty one
        self.tensors: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.codes: dict[tuple[str, int], int] = {}

    def write(self, program: Program, facts: Mapping[str, Any]) -> bytes:
        schema = self.schema
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.inputs, graph.name = [self._number(program.input)], "main"
        graph.operators = [self._operator(x) for x in program.operations]
        graph.outputs, graph.tensors = [self._number(program.output)], self.tensors
        for value in (program.input, program.output):
            self.tensors[self._number(value)].shapeSignature = [-1, *value.shape[1:]]
        model.version, model.subgraphs, model.description = 3, [graph], "adq-train"
        model.operatorCodes = [self._code(*key) for key in self.codes]
        model.signatureDefs = [self._signature(program)]
        metadata = schema.MetadataT()
        metadata.name = METADATA_KEY
        metadata.buffer = self._buffer(json.dumps(facts).encode())
        model.metadata, model.buffers = [metadata], self.buffers
        builder = self.flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _number(self, value: Value | None) -> int:
        """The index of a tensor; -1 stands for none."""
        if value is None:
            return -1
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.tensors)
            self.tensors.append(self._tensor(value))
        return self.numbers[id(value)]

    def _tensor(self, value: Value) -> Any:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape = value.name, list(value.shape)
        tensor.type = getattr(self.schema.TensorType, value.dtype.upper())
        if value.data is not None:
            tensor.buffer = self._buffer(
                value.data.astype(np.dtype(value.dtype).newbyteorder("<")).tobytes()
            )
        if value.scale is not None:
            tensor.quantization = grid = self.schema.QuantizationParametersT()
            grid.scale = np.atleast_1d(value.scale).astype(np.float32)
            grid.zeroPoint = np.full(len(grid.scale), value.zero_point, np.int64)
            grid.quantizedDimension = value.axis
        return tensor

    def _buffer(self, content: bytes) -> int:
        self.buffers.append(_Aligned(self.schema, content))
        return len(self.buffers) - 1

    def _operator(self, operation: Operation) -> Any:
        schema, operator = self.schema, self.schema.OperatorT()
        key = (operation.kind, operation.version)
        operator.opcodeIndex = self.codes.setdefault(key, len(self.codes))
        operator.inputs = [self._number(x) for x in operation.inputs]
        operator.outputs = [self._number(operation.output)]
        if name := OPTIONS.get(operation.kind):
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            operator.builtinOptions = options = getattr(schema, f"{name}T")()
            for field_name, content in operation.options.items():
                assert hasattr(options, field_name), field_name
                setattr(options, field_name, content)
        return operator

    def _code(self, kind: str, version: int) -> Any:
        code, known = self.schema.OperatorCodeT(), self.schema.BuiltinOperator
        code.builtinCode = getattr(known, kind, known.CUSTOM)
        # What readers of 2020 and before look at; larger codes did not exist.
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = version
        if code.builtinCode == known.CUSTOM:
            code.customCode = kind
        return code

    def _signature(self, program: Program) -> Any:
        """Names for the input and the output, by which runtimes address them."""
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        for group, value in (("inputs", program.input), ("outputs", program.output)):
            entry = self.schema.TensorMapT()
            entry.name, entry.tensorIndex = value.name, self._number(value)
            setattr(signature, group, [entry])
        return signature


class _Aligned:
    """A buffer whose content begins at a multiple of 16 bytes, as the format demands.

    The schema's own ``BufferT`` leaves that out.
    """

    def __init__(self, schema: Any, content: bytes) -> None:
        self.schema, self.content = schema, content

    def Pack(self, builder: Any) -> Any:  # noqa: N802 (the name that the schema calls)
        builder.StartVector(1, len(self.content), ALIGNMENT)
        builder.head -= len(self.content)
        builder.Bytes[builder.head : builder.head + len(self.content)] = self.content
        data = builder.EndVector()
        self.schema.BufferStart(builder)
        self.schema.BufferAddData(builder, data)
        return self.schema.BufferEnd(builder)
