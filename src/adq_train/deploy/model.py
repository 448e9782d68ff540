"""A trained network as data: tables for the quantized layers, float values for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.data.base import InputFormat
from adq_train.deploy.architecture import build_network
from adq_train.deploy.layer_tables import Edge, LayerTables, tables_of
from adq_train.deploy.packed_layers import PackedLayer, PackedSubclass, Rescale, packed_layer
from adq_train.errors import UserError
from adq_train.quantization.attention import with_new_names
from adq_train.quantization.copies import own_copy
from adq_train.quantization.edges import EDGES, edge_quantizers
from adq_train.quantization.layers import is_subclass
from adq_train.quantization.prepare import keep_weights, quantized_layers, swap
from adq_train.quantization.products import has_products
from adq_train.quantization.target import AttentionTarget, Int8Target, target_of
from adq_train.settings.targets import TRUSTED_PREFIXES

QUANTIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding)


@dataclass(frozen=True)
class TableModel:
    """Everything that evaluation needs, and nothing that training needs.

    Attributes:
        model: The config's ``model`` section, which rebuilds the architecture; empty where only
            its owner can.
        data: The config's ``data`` section, to evaluate on; empty where there is none.
        expects: What the network expects of an image, and its classes; None where that is not
            known.
        layers: The quantized layers by name.
        floats: What stays float, by its name in the float network: norms, biases, other layers.
        folded: Batch norms that went into a convolution: norm → convolution.
        edges: What quantizes values besides inputs of layers: between them, in the order of the
            graph (``target=int8``), or those that attention multiplies.
        target: Where there are edges, which of the two.
        run: Where it comes from: command, seed, commit, versions, data fingerprint, bits.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    expects: InputFormat | None
    layers: dict[str, LayerTables]
    floats: dict[str, Tensor]
    folded: dict[str, str] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    run: dict[str, Any] = field(default_factory=dict)
    target: str = Int8Target.name

    def facts(self) -> dict[str, Any]:
        """What a file says about itself besides the network."""
        known = {"input": self.expects.to_dict()} if self.expects else {}
        return {**known, "data": self.data or None, "run": self.run}


def tables_of_network(network: nn.Module) -> TableModel:
    """A quantized network of any class as tables.

    Args:
        network: On the CPU, in evaluation mode; its weights become parameters.

    Raises:
        UserError: A quantizer cannot be put in tables.
    """
    keep_weights(network)
    layers = quantized_layers(network)
    return TableModel(
        model={},
        data={},
        expects=None,
        layers={name: tables_of(name, layer) for name, layer in layers.items()},
        floats={k: v.detach() for k, v in float_state(network, layers).items()},
        edges=tuple(
            Edge(float(x.width().detach()), x.low, x.high) for x in edge_quantizers(network)
        ),
        target=AttentionTarget.name if has_products(network) else Int8Target.name,
    )


def float_state(network: nn.Module, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """The float parameters and kept buffers outside the quantized weights and their quantizers.

    Args:
        network: A float network, or one with quantized layers.
        layers: Names of the layers whose weights are quantized.

    Returns:
        Tensors by name; one that has several names has the first.
    """
    kept = network.state_dict()
    named = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    found: dict[int, tuple[str, Tensor]] = {}
    modules = {network.get_submodule(layer) for layer in layers}
    weights: set[str] = set()
    biases: set[str] = set()
    apart = [f"{EDGES}."]
    for name, module in network.named_modules(remove_duplicate=False):  # by all their names
        if module in modules:
            biases.add(f"{name}.bias")
            # A subclass may have values of its own.
            parts = ("weight_quantizer.", "input_quantizer.") if is_subclass(module) else ("",)
            apart += [f"{name}.{part}" for part in parts]
            weights.add(f"{name}.weight")
    for name, tensor in named:
        quantized = name in weights or (name.startswith(tuple(apart)) and name not in biases)
        if name in kept and not quantized and tensor.is_floating_point():
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


@torch.no_grad()
def assemble(
    model: TableModel,
    dense: bool = True,
    network: nn.Module | None = None,
    trusted: tuple[str, ...] = TRUSTED_PREFIXES,
) -> nn.Module:
    """The network that evaluates from the tables, on the CPU.

    Args:
        model: The tables.
        dense: Whether to unpack the weights once; otherwise they stay codes of one byte each.
        network: The architecture, with any weights, float or quantized; left as it was. None:
            the one that ``model.model`` names.
        trusted: Where that may be defined.

    Raises:
        UserError: Names or shapes are not those of the architecture.
    """
    if network is not None:
        network = own_copy(network).cpu().eval()
    else:
        assert model.expects is not None
        expects = model.expects
        network = build_network(model.model, expects.num_classes, expects.image_shape[0], trusted)
    network.requires_grad_(False)
    keep_weights(network)
    modules = dict(network.named_modules())
    unknown = [name for name in (*model.layers, *model.folded) if name not in modules]
    if unknown:
        raise UserError(f"the architecture has no layer {unknown[0]!r}")
    for norm, convolution in model.folded.items():
        layer = modules[convolution]
        is_norm = isinstance(modules[norm], nn.modules.batchnorm._BatchNorm)
        if not is_norm or convolution not in model.layers:
            raise UserError(f"{norm!r} is no batch norm that {convolution!r} could take")
        if layer.bias is None:
            size = len(model.layers[convolution].weight.codes)
            layer.bias = nn.Parameter(torch.empty(size), requires_grad=False)
        network.set_submodule(norm, nn.Identity())
    own, floats = float_state(network, model.layers), with_new_names(network, model.floats)
    odd = sorted(own.keys() ^ floats.keys())
    if odd:
        raise UserError(f"the architecture and the float values differ in {', '.join(odd[:3])}")
    for name, tensor in own.items():
        if tensor.shape != floats[name].shape:
            raise UserError(
                f"{name} has shape {tuple(floats[name].shape)}, the architecture's "
                f"{tuple(tensor.shape)}"
            )
        tensor.copy_(floats[name])
    packed = {}
    for name, tables in model.layers.items():
        layer = modules[name]
        shape = getattr(getattr(layer, "weight", None), "shape", None)
        if not isinstance(layer, QUANTIZED):
            raise UserError(f"{name!r} is no layer that can be quantized")
        if isinstance(layer, nn.Embedding) != (len(tables.input.levels) == 1):
            raise UserError(f"{name!r} has an input of another kind than the architecture's")
        if shape != tables.weight.codes.shape:
            raise UserError(f"layer {name} has weights of another shape than the architecture's")
        packed[name] = packed_layer(layer, tables, dense)
    swap(network, packed)
    if model.edges:
        steps = (Rescale(x.step, x.low, x.high) for x in model.edges)
        target_of(model.target).connect(network, steps, (PackedLayer, PackedSubclass))
    return network.eval()
