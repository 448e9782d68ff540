"""ONNX: weights as codes of one byte and a lookup, inputs by comparisons.

The packages onnx, onnxscript and onnxruntime are an extra: ``pip install adq-train[export]``.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.deploy.formats import METADATA_KEY, Source, Written, require
from adq_train.deploy.layer_tables import Staircase
from adq_train.deploy.model import TableModel, assemble
from adq_train.deploy.packed_layers import FEW, PackedLayer, PackedSubclass, Steps, look_up
from adq_train.errors import UserError, first_line


def write(source: Source) -> Written:
    """The content of the file, and the network as its tables give it."""
    content = onnx_bytes(source.tables, source.architecture, source.example)
    return Written(content, assemble(source.tables, network=source.architecture))


@torch.library.custom_op("adq_train::count_below", mutates_args=())
def count_below(x: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds lie below each value, int64.

    One operation, so that the exporter meets one node and not the dozens that stand for it.

    Args:
        x: Any shape.
        thresholds: (2^b - 1,) ascending.
    """
    return torch.bucketize(x.contiguous(), thresholds)


@count_below.register_fake
def _(x: Tensor, thresholds: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int64)


def onnx_count_below(x: Any, thresholds: Any) -> Any:
    """:func:`count_below` in ONNX: a comparison with each threshold, or a binary search."""
    op = require("onnxscript").opset18
    uint8, int64 = 2, 7
    number = int(thresholds.shape[0])

    def constant(value: int) -> Any:
        return op.Constant(value_int=value)

    if number <= FEW:
        parts = op.Split(thresholds, num_outputs=number) if number > 1 else [thresholds]
        count = None
        for part in parts:
            above = op.Cast(op.Greater(x, part), to=uint8)
            count = above if count is None else op.Add(count, above)
        return op.Cast(count, to=int64)
    half = (number + 1) // 2
    middle = op.Gather(thresholds, constant(half - 1))
    count = op.Mul(op.Cast(op.Greater(x, middle), to=int64), constant(half))
    while half := half // 2:
        probe = op.Gather(thresholds, op.Add(count, constant(half - 1)))
        above = op.Cast(op.Greater(x, probe), to=int64)
        count = op.Add(count, op.Mul(above, constant(half)))
    return count


class OnnxSteps(Steps):
    """A staircase in one operation that the exporter is told how to write.

    Args:
        stairs: Thresholds and levels.
    """

    def __init__(self, stairs: Staircase) -> None:
        super().__init__(stairs)
        missing = 2**stairs.bit_width - 1 - len(stairs.thresholds)
        never = stairs.thresholds.new_full((missing,), torch.inf)
        self.thresholds = torch.cat([stairs.thresholds, never])

    def codes(self, x: Tensor) -> Tensor:
        """The number of thresholds below each value."""
        counts: Tensor = torch.ops.adq_train.count_below(x, self.thresholds)
        return counts

    def values(self, codes: Tensor) -> Tensor:
        """The level of each code."""
        if self.zero_point is not None:
            return (codes.float() - self.zero_point) * self.grid_step
        return look_up(self.levels, codes)


def onnx_network(model: TableModel, network: nn.Module | None = None) -> nn.Module:
    """The network in operations that ONNX has: lookups, comparisons and the float layers."""
    network = assemble(model, dense=False, network=network)
    for module in network.modules():
        if isinstance(module, PackedLayer | PackedSubclass):
            module.steps = OnnxSteps(module.steps.stairs)
    return network


def onnx_bytes(
    model: TableModel, network: nn.Module | None = None, example: Tensor | None = None
) -> bytes:
    """The network as an ONNX model with inputs ``images`` (N, C, H, W) and ``logits``; N is free.

    Args:
        model: The tables.
        network: The architecture, where the tables do not name it.
        example: Inputs (N, …), where the tables do not say their shape.

    Raises:
        UserError: The packages are missing, or the model cannot be exported.
    """
    require("onnx")
    require("onnxscript")
    if example is None:
        assert model.expects is not None
        example = torch.zeros(1, *model.expects.image_shape)
    network, images = onnx_network(model, network), torch.cat([example[:1]] * 2)
    try:
        with _quietly():
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                # Folding constants would put the float weights into the file.
                optimize=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table={
                    torch.ops.adq_train.count_below.default: onnx_count_below
                },
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever it meets
        reason = first_line(error.__cause__ or error)  # torch.onnx says what to do, not why
        raise UserError(f"torch.onnx cannot export this model: {reason}") from error
    assert program is not None
    proto = program.model_proto
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError(
            "torch.onnx fixes the size of a batch, which forward() asks for as a number; write "
            "x.shape[0] instead of len(x) or int(x.shape[0]), or torch.flatten(x, 1)"
        )
    for node in proto.graph.node:  # stack traces, several times the size of a small model
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    del proto.graph.value_info[:]  # runtimes infer the shapes between the layers
    return with_facts(proto, model)


def with_facts(proto: Any, model: TableModel) -> bytes:
    """An ONNX model as a file's content, with what it says about itself in its metadata."""
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(model.facts())
    content: bytes = proto.SerializeToString()
    return content


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the exporter's progress and warnings from the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
