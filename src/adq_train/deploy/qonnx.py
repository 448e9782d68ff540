"""QONNX with MultiThreshold: learned thresholds as they are, integer weights; for FINN.

The package qonnx is an extra: ``pip install adq-train[fpga]``.
"""

from __future__ import annotations

from torch import nn

from adq_train.deploy.fold import fold_batch_norms
from adq_train.deploy.formats import Source, Written
from adq_train.deploy.integers import moved, on_integers
from adq_train.deploy.model import TableModel, assemble
from adq_train.deploy.onnx import with_facts
from adq_train.deploy.qonnx_graph import qonnx_proto


def write(source: Source) -> Written:
    """The content of the file, and which levels are not the trained ones."""
    tables = _tables(source)
    proto = qonnx_proto(tables, source.network, source.example)
    return Written(with_facts(proto, tables), remarks=moved(source.tables.layers))


def reference(source: Source) -> nn.Module:
    """The network with the levels that the file has."""
    return assemble(_tables(source), network=source.network)


def _tables(source: Source) -> TableModel:
    """On integers, and with the batch norms folded that can be."""
    tables = on_integers(source.tables)
    return tables if tables.folded else fold_batch_norms(tables, source.network)
