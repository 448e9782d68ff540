"""What an ONNX file of anybody may not have, whatever runs it. Torch is not imported."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DOMAIN = "qonnx.custom_op.general"
# qonnx imports the module that a node's domain names, and some of its operations read files.
OPERATIONS = ("MultiThreshold", "Quant", "IntQuant", "BipolarQuant", "Trunc")


def check_places(proto: Any, path: Path) -> None:
    """Refuses a model whose tensors are kept anywhere but in files beside it.

    Raises:
        ValueError: Names the place.
    """
    for tensor in _tensors(proto):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        places = {entry.key: entry.value for entry in tensor.external_data}
        name = places.get("location", "")
        beside = path.parent / name
        plain = name not in ("", ".", "..") and Path(name).name == name
        if not plain or not beside.exists() or not stat.S_ISREG(os.lstat(beside).st_mode):
            raise ValueError(f"it keeps values in {name!r}, which is no plain file beside it")
        end = int(places.get("offset", 0)) + int(places.get("length", 0))
        if end > beside.stat().st_size:
            raise ValueError(f"it keeps values beyond the end of {name!r}")


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor within a protobuf message, wherever it is."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            yield from _tensors(part)


def check_operations(proto: Any) -> None:
    """Refuses a model with operations that are not ONNX's or a few of qonnx's.

    Raises:
        ValueError: Names one.
    """
    if proto.functions:
        raise ValueError("it has functions of its own")
    for node in _nodes(proto.graph):
        known = node.op_type in OPERATIONS if node.domain == DOMAIN else not node.domain
        if not known and node.domain != "ai.onnx":
            raise ValueError(f"its operation {node.op_type} of {node.domain!r} is not known here")


def _nodes(graph: Any) -> Iterable[Any]:
    """The nodes of a graph and of the graphs within them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
