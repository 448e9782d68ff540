"""QONNX with MultiThreshold: learned thresholds as they are, integer weights; for FINN.

The package qonnx is an extra: ``pip install adq-train[fpga]``.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from adq_train.deploy.apart import FileApart, FileHere
from adq_train.deploy.fold import fold_batch_norms
from adq_train.deploy.formats import METADATA_KEY, Opened, Source, Written
from adq_train.deploy.integers import moved, on_integers
from adq_train.deploy.model import TableModel, assemble
from adq_train.deploy.qonnx_graph import qonnx_proto


def write(source: Source) -> Written:
    """The content of the file, and which levels are not the trained ones."""
    tables = _tables(source)
    proto = qonnx_proto(tables, source.network, source.example)
    known = {"input": tables.expects.to_dict()} if tables.expects else {}
    facts = {**known, "data": tables.data or None, "run": tables.run}
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(facts)
    return Written(proto.SerializeToString(), remarks=moved(source.tables.layers))


def reference(source: Source) -> nn.Module:
    """The network with the levels that the file has."""
    return assemble(_tables(source), network=source.network)


def run(path: Path, source: Source) -> nn.Module:
    """The file in qonnx's executor."""
    return FileHere(path, "qonnx")


def open_file(path: Path) -> Opened:
    """A file of anybody, in a process of its own."""
    apart = FileApart(path, "qonnx")
    return Opened("qonnx", apart, apart.expects, apart.facts.get("data"), apart.facts.get("run"))


def _tables(source: Source) -> TableModel:
    """On integers, and with the batch norms folded that can be."""
    tables = on_integers(source.tables)
    return tables if tables.folded else fold_batch_norms(tables, source.network)
