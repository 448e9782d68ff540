"""QONNX with MultiThreshold: learned thresholds as they are, integer weights; for FINN.

The package qonnx is an extra: ``pip install adq-train[fpga]``.
"""

from __future__ import annotations

from adq_train.deploy.fold import fold_batch_norms
from adq_train.deploy.formats import Source, Written
from adq_train.deploy.integers import moved, on_integers
from adq_train.deploy.model import assemble
from adq_train.deploy.onnx import with_facts
from adq_train.deploy.qonnx_graph import qonnx_proto


def write(source: Source) -> Written:
    """The content of the file, and which levels are not the trained ones."""
    tables = on_integers(source.tables)
    if not tables.folded:
        tables = fold_batch_norms(tables, source.network)
    proto = qonnx_proto(tables, source.network, source.example)
    reference = assemble(tables, network=source.network)
    return Written(with_facts(proto, tables), reference, remarks=moved(source.tables.layers))
