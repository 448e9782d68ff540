"""Batch norms in evaluation mode are scales and offsets; a convolution before one can take both."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import torch
from torch import fx, nn

from adq_train.deploy.model import TableModel, assemble
from adq_train.deploy.packed_layers import PackedLayer, PackedSubclass, Rescale
from adq_train.quantization.graph import Tracer

log = logging.getLogger(__name__)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def foldable(network: nn.Module) -> dict[str, str]:
    """Norm → convolution, for each quantized convolution whose output goes to one norm alone.

    Args:
        network: From :func:`~adq_train.deploy.model.assemble`; one whose forward() cannot be
            traced has none.
    """
    try:
        graph = Tracer((PackedLayer, PackedSubclass, Rescale)).trace(network)
    except Exception as error:  # a forward() may do anything with the proxies that it gets
        log.warning("no batch norm is folded: the model cannot be traced (%s)", error)
        return {}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    pairs = {}
    for node in graph.nodes:
        if node.op != "call_module" or calls[node.target] > 1 or not node.args:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        norm = network.get_submodule(str(node.target))
        layer = network.get_submodule(str(source.target))
        if (
            type(norm) in NORMS
            and norm.running_var is not None
            and calls[source.target] == 1
            and isinstance(layer, PackedLayer)
            and not isinstance(layer.layer, nn.Linear)
        ):
            pairs[str(node.target)] = str(source.target)
    return pairs


@torch.no_grad()
def fold_batch_norms(model: TableModel, network: nn.Module | None = None) -> TableModel:
    """The same network with its batch norms folded into the convolutions before them.

    With g = γ / sqrt(variance + ε), a channel's scale is multiplied by g and its bias becomes
    β + g (bias - mean). The codes and the codebook stay; the rounding of the logits does not.

    Args:
        model: Tables of a network.
        network: The architecture, where the tables do not name one of this package.

    Returns:
        Tables without the norms that could be folded.
    """
    network = assemble(model, network=network)
    layers, floats = dict(model.layers), dict(model.floats)
    pairs = foldable(network)
    for norm_name, name in pairs.items():
        norm = network.get_submodule(norm_name)
        assert isinstance(norm, NORMS)
        tables = layers[name]
        zeros = torch.zeros(tables.weight.codes.shape[0])
        gamma = floats.pop(f"{norm_name}.weight", zeros + 1).double()
        beta = floats.pop(f"{norm_name}.bias", zeros).double()
        mean = floats.pop(f"{norm_name}.running_mean").double()
        variance = floats.pop(f"{norm_name}.running_var").double()
        gain = gamma * (variance + norm.eps).rsqrt()
        bias = beta + gain * (floats.get(f"{name}.bias", zeros).double() - mean)
        scale = gain if tables.weight.scale is None else gain * tables.weight.scale.double()
        layers[name] = replace(tables, weight=replace(tables.weight, scale=scale.float()))
        floats[f"{name}.bias"] = bias.float()
    return replace(model, layers=layers, floats=floats, folded=pairs)
