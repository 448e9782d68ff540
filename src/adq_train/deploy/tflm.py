"""TensorFlow Lite Micro: the .tflite file with weights packed to as many bits as they need.

Operation TFLM_DECODE unpacks a layer's weights right before the layer, into memory that the next
one uses again: indices of b bits, the most significant bit first, and tables of values. Layout:
https://github.com/tensorflow/tflite-micro, tensorflow/lite/micro/compression.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from adq_train.deploy.formats import Source, Written
from adq_train.deploy.tflite import written
from adq_train.deploy.tflite_file import Operation, Program, Value

DECODE = "TFLM_DECODE"
LOOKUP, HEADER_VERSION, TABLE_VERSION = 0, 1, 1
HEADER_BYTES = 16
MOST_BITS = 7
# What the operation and its tensors take in a file, and a reason to spend time at all.
LEAST_GAIN = 192
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def write(source: Source) -> Written:
    """The content of the file."""
    return written(source, compressed)


def compressed(program: Program) -> Program:
    """The same program with a lookup for each layer whose weights have at most 128 values."""
    return replace(program, operations=tuple(_unpacked(program)))


def _unpacked(program: Program) -> Iterator[Operation]:
    for operation in program.operations:
        weight = operation.inputs[1] if operation.kind in WEIGHTED else None
        packed = None if weight is None else lookup(weight)
        if weight is None or packed is None:
            yield operation
            continue
        unpacked = replace(weight, data=None)
        yield Operation(DECODE, 1, packed, unpacked)
        x, _, bias = operation.inputs
        yield replace(operation, inputs=(x, unpacked, bias))


def lookup(weight: Value) -> tuple[Value, Value] | None:
    """Indices and tables of a constant, or None where they hardly take less than it does.

    There is a table for each channel, all the same: runtimes have read one table as several where
    a tensor has a scale per channel.
    """
    assert weight.data is not None
    values, indices = np.unique(weight.data.astype(np.int8), return_inverse=True)
    bits = max(1, int(len(values) - 1).bit_length())
    if bits > MOST_BITS:
        return None
    tables = np.tile(values, weight.shape[weight.axis])
    header = np.zeros(HEADER_BYTES, np.uint8)
    header[[0, 1, 4, 5, 6]] = (
        LOOKUP, HEADER_VERSION, TABLE_VERSION, weight.axis << 4 | bits, len(values)
    )  # fmt: skip
    content = np.concatenate([header, tables.view(np.uint8)])
    packed = pack(indices.ravel(), bits)
    if weight.data.size - len(packed) - len(content) < LEAST_GAIN:
        return None
    return (
        Value(f"{weight.name}/indices", (len(packed),), "uint8", data=packed),
        Value(f"{weight.name}/tables", (len(content),), "uint8", data=content),
    )


def pack(indices: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Numbers of some bits one behind the other, the most significant bit first.

    Args:
        indices: (N,) below 2^bits.
        bits: 1 … 8.

    Returns:
        (⌈N · bits / 8⌉,); the last byte is filled up with zeros.
    """
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits((indices[:, None] >> shifts & 1).astype(np.uint8).ravel())
