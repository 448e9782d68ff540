"""Eight bits for what passes between layers: sums, concatenations, pools, and what several read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from adq_train.errors import UserError
from adq_train.quantization.copies import below
from adq_train.quantization.graph import Graph, place
from adq_train.quantization.layer_weights import evaluating
from adq_train.quantization.lsq import StepQuantizer
from adq_train.quantization.prepare import sampled
from adq_train.quantization.watch import intercepted

# The attribute of a network that holds the quantizers of its edges, in the order of its graph.
EDGES = "edge_quantizers"
EDGE_BITS = 8

# What makes a value, what becomes one with it, and what hands it on as it is.
MAKES = ("input", "layer", "add", "cat", "avg_pool", "adaptive_avg_pool", "mean")
COMPLETES = ("batch_norm", "relu", "relu6", "identity")
PASSES = (*COMPLETES, "max_pool", "flatten", "slice", "pad")


class EdgeQuantizer(StepQuantizer):
    """A learned step on a value between layers: codes 0 … 255, or -128 … 127.

    The quantizer and the gradient of the step are LSQ's (arXiv 1902.08153, equations 1–3). The step
    is learned as a logarithm: steps of 8 bits are small, and one step of an optimizer means the
    same relative change in each.
    """

    what = "values"

    def __init__(self) -> None:
        super().__init__(EDGE_BITS)
        self.log_step = nn.Parameter(torch.zeros(()))

    def fit(self, values: Tensor, seed: int) -> None:
        """The step of least squared error on a sample; negative values make the range signed."""
        self.log_step.copy_(self.fitted_step(values).log())

    def width(self) -> Tensor:
        """The step (), with its gradient."""
        return self.log_step.exp()


def edges(graph: Graph) -> Iterator[fx.Node]:
    """The nodes whose values need a quantizer of their own, in the order of the graph.

    Each value that a layer, an addition, a concatenation or an average makes, and the input of the
    network, after the batch norm and the ReLU that follow it; but not where its only reader is one
    quantized layer, whose own quantizer sees it, nor what the network returns.

    Raises:
        UserError: An operation is not known; it is named.
    """
    nodes = list(graph)
    for node in nodes:
        operation = graph.operation(node)
        if operation.kind == "other":
            of = f", {type(operation.module).__name__}" if operation.module else ""
            raise UserError(
                f"target: int8 does not know {place(node)}{of}; it knows quantized layers, batch "
                "norm, relu, relu6, pools, mean, flatten, slices, zero padding, dropout, additions "
                "and concatenations; put one of these in its place, and a number where a size is "
                "asked for; or take target=float, and "
                "format=packed or onnx for the file"
            )
    for node in nodes:
        if graph.operation(node).kind not in MAKES:
            continue
        while (reader := _only_reader(node)) and graph.operation(reader).kind in COMPLETES:
            node = reader
        if _needs_own(graph, node):
            yield node


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 else None


def _needs_own(graph: Graph, node: fx.Node) -> bool:
    """Whether nothing further on quantizes a value, and something would want it quantized."""
    while (reader := _only_reader(node)) and graph.operation(reader).kind in PASSES:
        node = reader
    return bool(node.users) and not (
        reader and graph.operation(reader).kind in ("layer", "output", "leaf")
    )


def connect(
    network: nn.Module,
    quantizers: Iterable[nn.Module] | None = None,
    layers: tuple[type[nn.Module], ...] = (),
) -> nn.Module:
    """Puts quantizers on a network's edges, in place: its ``forward()`` becomes that of its graph.

    Names of modules and parameters stay; the quantizers are a list ``edge_quantizers``.

    Args:
        network: With quantized layers, on any device. One that has such quantizers gets others.
        quantizers: As many as there are edges; None: new ones, not calibrated.
        layers: Classes that stand for quantized layers; see :class:`~.graph.Graph`.

    Raises:
        UserError: The graph cannot be followed, which names the place; or it has another number
            of edges.
    """
    graph, found = None, edge_quantizers(network)
    if not found:
        graph = Graph(network, layers=layers)
        for number, node in enumerate(list(edges(graph))):
            with graph.fx.inserting_after(node):
                edge = graph.fx.call_module(f"{EDGES}.{number}", (node,))
            node.replace_all_uses_with(edge)
            edge.args = (node,)
            found.append(EdgeQuantizer())
    new = found if quantizers is None else list(quantizers)
    if len(new) != len(found):
        raise UserError(f"model: it has {len(found)} edges between layers, not {len(new)}")
    device = next(network.parameters()).device
    setattr(network, EDGES, nn.ModuleList(new).to(device))
    if graph:
        _follow(network, graph.fx)
    return network


def _follow(network: nn.Module, graph: fx.Graph) -> None:
    """Gives one network, in place, the ``forward()`` that a graph describes."""
    if isinstance(network, fx.GraphModule):
        network.graph = graph
        return
    # A class of its own with this forward(), as nn.utils.parametrize makes one: so copies keep it,
    # and everything else of the network stays what it was.
    forward = type(fx.GraphModule(network, graph)).forward
    network.__class__ = below(type(network), {"forward": forward})


def edge_quantizers(network: nn.Module) -> list[Any]:
    """The quantizers on the edges of a network, in the order of its graph; none for most."""
    found = getattr(network, EDGES, ())
    return list(found) if isinstance(found, nn.ModuleList) else []


@torch.no_grad()
def calibrate_edges(
    network: nn.Module, batches: Sequence[Tensor], seed: int, places: Sequence[str] = ()
) -> None:
    """Initialises the steps of a network's edges from what passes there.

    Args:
        network: From :func:`connect`, its layers calibrated.
        batches: Images (N, …).
        seed: Which values are drawn.
        places: What messages call the quantizers.

    Raises:
        UserError: A value is NaN or infinite, or none passes at one of them.
    """
    quantizers = {f"{EDGES}.{i}": x for i, x in enumerate(edge_quantizers(network))}
    samples: dict[str, list[Tensor]] = {name: [] for name in quantizers}

    def record(name: str, forward: Callable[..., Any], x: Tensor) -> Tensor:
        samples[name].append(sampled(x, seed, name, len(samples[name])))
        return x

    with evaluating(network), intercepted(quantizers, record):
        for images in batches:
            network(images)
    for (name, quantizer), where in zip(quantizers.items(), places or quantizers, strict=True):
        if not samples[name]:
            raise UserError(
                f"target: {where} never came to a quantizer; use target=float, or let the module "
                "call scaled_dot_product_attention"
            )
        try:
            quantizer.calibrate(torch.cat(samples[name]))
        except ValueError as error:
            raise UserError(f"{where}: {error}; check the float model") from error
