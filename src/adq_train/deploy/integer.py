"""The network as integer runtimes compute it: int8 weights, steps, and nothing else to round.

It is the one form that the writers of other runtimes' files walk, and what their files are compared
with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from adq_train.deploy.layer_tables import Staircase, staircase, uniform_grid, weight_table
from adq_train.deploy.packed_layers import Rescale as Rescale
from adq_train.errors import UserError
from adq_train.quantization.copies import own_copy
from adq_train.quantization.edges import edges
from adq_train.quantization.graph import Graph, Operation, place
from adq_train.quantization.int8_grid import int8_codes, int8_step
from adq_train.quantization.layer_weights import used_weight
from adq_train.quantization.layers import QuantConv2d, QuantLayer, QuantLinear, float_kind
from adq_train.quantization.prepare import keep_weights

# Of int32: a bias leaves as much again for the sum that it is added to.
LARGEST_BIAS = 2**30
CURE = "train it with target=int8, or with init_from=RUN_FOLDER target=int8 from where it is"


class IntegerLayer(nn.Module):
    """What an integer convolution and an integer linear layer have in common.

    Args:
        codes: (C_out, …) int8, -127 … 127.
        scale: (C_out,) float32, positive: a weight is ``codes * scale`` of its channel.
        bias: (C_out,) float32 or None; a multiple of ``scale`` times the step of the input.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def weight(self) -> Tensor:
        """The weights (C_out, …), in the dtype of the scale."""
        scale = self.scale.view(-1, *[1] * (self.codes.dim() - 1))
        return self.codes.to(scale.dtype) * scale


class IntegerConv2d(IntegerLayer):
    """A convolution with int8 weights; its geometry is that of :class:`torch.nn.Conv2d`."""

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, of: nn.Conv2d, padding: Any
    ) -> None:
        super().__init__(codes, scale, bias)
        self.stride, self.padding, self.dilation = of.stride, padding, of.dilation
        self.groups = of.groups

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x, self.weight(), self.bias, *geometry)


class IntegerLinear(IntegerLayer):
    """A linear layer with int8 weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, …, in_features) to (N, …, out_features)."""
        return F.linear(x, self.weight(), self.bias)


OURS = (Rescale, IntegerConv2d, IntegerLinear)


def integer_graph(network: nn.Module) -> Graph:
    """The graph of what :func:`integer_network` gives; modules of ours are its ``leaf`` nodes."""
    return Graph(network, OURS)


@torch.no_grad()
def integer_network(network: nn.Module) -> fx.GraphModule:
    """A network that was made for ``target=int8`` in integers, on the CPU, in evaluation mode.

    Its modules are :class:`Rescale`, :class:`IntegerConv2d`, :class:`IntegerLinear` under their
    layers' names, and torch's operations without weights; a batch norm stays where no layer stands
    before it. It computes what the trained network does, up to rounding: of sums, and of biases to
    multiples of the products' steps. A ReLU that the Rescale after it does as well is left out, and
    a Rescale stands before a max pool, a flattening, a slice or zero padding, not behind it.

    Args:
        network: From :func:`~adq_train.quantize` or a run; left as it was.

    Raises:
        UserError: It was not made for integers, or a layer of it cannot be; the layer is named.
    """
    network = own_copy(network).cpu().eval()
    keep_weights(network)
    graph = Graph(network)
    try:
        bare = list(edges(graph))
    except UserError as error:
        raise UserError(f"format: this one is for runs with target=int8, and {error}") from error
    for node in bare:
        raise UserError(
            f"format: the network is not one of target=int8: nothing quantizes what {place(node)} "
            f"gives; {CURE}"
        )
    calls = Counter(str(node.target) for node in graph if node.op == "call_module")
    folded = {}
    # All are read before one is replaced: a layer may be called again.
    for node, operation in [(node, graph.operation(node)) for node in graph]:
        if operation.kind == "layer":
            norm = _norm_of(graph, node, calls)
            _replace_layer(graph, node, operation.module, norm)
            if norm is not None:
                folded[norm] = node
        elif operation.kind == "leaf":
            assert operation.module is not None
            network.set_submodule(str(node.target), rescale(str(node.target), operation.module))
    for norm in folded:
        _leave_out(norm)
    _simplify(graph)
    graph.fx.lint()
    return fx.GraphModule(network, graph.fx).requires_grad_(False).eval()


def _norm_of(graph: Graph, node: fx.Node, calls: Mapping[str, int]) -> fx.Node | None:
    """The batch norm that alone reads what a layer gives, where both are called once."""
    reader = next(iter(node.users))
    alone = len(node.users) == 1 and graph.operation(reader).kind == "batch_norm"
    if not alone or calls[str(node.target)] > 1 or calls[str(reader.target)] > 1:
        return None
    return reader if graph.module(reader).running_var is not None else None


def _replace_layer(graph: Graph, node: fx.Node, layer: Any, norm: fx.Node | None) -> None:
    """Puts a Rescale and an integer layer in the place of a quantized one."""
    name = str(node.target)
    input_name = f"{name}_input"
    if not isinstance(graph.module(node), OURS):  # called before
        step = rescale(name, layer.input_quantizer)
        new = integer_layer(name, layer, step.step, graph.module(norm) if norm else None)
        graph.network.set_submodule(name, new)
        graph.network.set_submodule(input_name, step)
    with graph.fx.inserting_before(node):
        source = graph.fx.call_module(input_name, (node.args[0],))
    source.meta = dict(node.meta)
    node.args = (source,)


def rescale(name: str, quantizer: Any) -> Rescale:
    """The Rescale that a quantizer of inputs is, read off its staircase.

    Args:
        name: Of the layer, for messages.
        quantizer: Calibrated or trained, on the CPU.

    Raises:
        UserError: Its levels or thresholds are not evenly spaced, or no integers hold its codes.
    """
    try:
        stairs = staircase(quantizer)
    except ValueError as error:
        raise UserError(f"layer {name} cannot be exported: {error}") from error
    grid = uniform_grid(stairs.levels)
    if grid is None or not _is_even(stairs, *grid):
        raise UserError(
            f"format: the levels of {name}'s input ({type(quantizer).__name__}) are not evenly "
            f"spaced, as integers are; {CURE}"
        )
    step, zero_point = grid
    return Rescale(float(step), -zero_point, len(stairs.levels) - 1 - zero_point)


def _is_even(stairs: Staircase, step: Tensor, zero_point: int) -> bool:
    """Whether each threshold is halfway between its levels, up to rounding."""
    halfway = (torch.arange(len(stairs.thresholds)) - zero_point + 0.5) * step
    return bool(((stairs.thresholds - halfway).abs() <= 1e-3 * step).all())


def integer_layer(
    name: str, layer: QuantLayer, input_step: float, norm: Any = None
) -> IntegerLayer:
    """A quantized layer, and the batch norm behind it, in integers.

    Args:
        name: Of the layer, for messages.
        layer: On the CPU, its weight a parameter.
        input_step: The step of its input.
        norm: A batch norm with running statistics, or None.

    Raises:
        UserError: Its weights are not on an int8 grid, or there is no such integer layer.
    """
    try:
        table = weight_table(layer.weight_quantizer, used_weight(layer))
    except ValueError as error:
        raise UserError(f"layer {name} cannot be exported: {error}") from error
    step = int8_step(table.codebook)
    places = int8_codes(table.codebook, step)
    if ((table.codebook / step - places).abs() > 1e-3).any():
        raise UserError(f"format: the weight levels of {name} are on no int8 grid; {CURE}")
    codes = places.to(torch.int8)[table.codes.long()]
    channels = codes.shape[0]
    scale = step.double() * torch.ones(channels, dtype=torch.float64)
    bias = torch.zeros(channels, dtype=torch.float64)
    if table.scale is not None:
        scale = scale * table.scale
    if layer.bias is not None:
        bias = bias + layer.bias
    if norm is not None:
        gain = (norm.running_var.double() + norm.eps).rsqrt()
        gain = gain if norm.weight is None else gain * norm.weight
        bias = gain * (bias - norm.running_mean)
        bias = bias if norm.bias is None else bias + norm.bias
        scale = scale * gain
    codes, scale, rounded = _in_range(codes, scale, bias, input_step)
    has_bias = layer.bias is not None or norm is not None
    parts = codes, scale, rounded if has_bias else None
    if isinstance(layer, QuantLinear):
        return IntegerLinear(*parts)
    if isinstance(layer, QuantConv2d):
        return IntegerConv2d(*parts, layer, _padding(name, layer))
    raise UserError(
        f"format: {name} is a {float_kind(layer).__name__}; integer networks have Conv2d and "
        "Linear layers"
    )


def _in_range(
    codes: Tensor, scale: Tensor, bias: Tensor, input_step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8, positive scales and biases float32 whose products int32 can hold.

    A channel that is all but switched off, with a scale that is 0 or far below its bias, gets the
    smallest scale that can carry the bias, and codes that say so.

    Args:
        codes: (C_out, …) int8.
        scale: (C_out,) float64, of any sign.
        bias: (C_out,) float64.
        input_step: Of the input.
    """
    each = (-1, *[1] * (codes.dim() - 1))
    codes = codes * scale.sign().to(torch.int8).view(each)
    least = (bias.abs() / (LARGEST_BIAS * input_step)).clamp_min(1e-30)
    carried = torch.maximum(scale.abs(), least).float()
    shrunk = (codes * (scale.abs() / carried).view(each)).round().to(torch.int8)
    codes = torch.where((scale.abs() < least).view(each), shrunk, codes)
    grid = carried.double() * input_step
    return codes, carried, ((bias / grid).round() * grid).float()


def _padding(name: str, layer: nn.Conv2d) -> tuple[int, int]:
    """Zeros on each side, (height, width).

    Raises:
        UserError: They are no zeros, or not as many on both sides.
    """
    if layer.padding_mode == "zeros":
        if isinstance(layer.padding, tuple):
            return layer.padding[0], layer.padding[1]
        if layer.padding == "valid":
            return 0, 0
        both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if not any(x % 2 for x in both):
            return both[0] // 2, both[1] // 2
    raise UserError(
        f"format: {name} pads with {layer.padding_mode}, {layer.padding!r}; integer networks pad "
        "with zeros, as many on either side"
    )


def _leave_out(node: fx.Node) -> None:
    """Takes an operation of one input out of its graph."""
    (source,) = node.all_input_nodes
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _simplify(graph: Graph) -> None:
    """What computes the same in fewer operations, or lets a Rescale follow its layer at once."""
    for node in graph:
        operation = graph.operation(node)
        if operation.kind == "identity":
            _leave_out(node)
        elif operation.kind == "mean":
            _as_pool(graph, node, operation)
    for node in graph:
        if _rescale_at(graph, node) is not None:
            _move_up(graph, node)
    for node in graph:
        readers = [_rescale_at(graph, x) for x in node.users]
        if graph.operation(node).kind == "relu" and all(x and x.low == 0 for x in readers):
            _leave_out(node)


def _rescale_at(graph: Graph, node: fx.Node) -> Rescale | None:
    module = graph.module(node) if node.op == "call_module" else None
    return module if isinstance(module, Rescale) else None


def _move_up(graph: Graph, node: fx.Node) -> None:
    """Moves a Rescale before what hands values on as they are, as far as it alone reads them."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    passes = ("max_pool", "flatten", "slice", "pad")
    while len(first.users) == 1 and graph.operation(first).kind in passes:
        first = graph.operation(first).inputs[0]
    if first is node.args[0]:
        return
    (reader,) = (x for x in first.users if _leads_to(x, node))
    with graph.fx.inserting_after(first):
        moved = graph.fx.call_module(str(node.target), (first,))
    moved.meta = dict(node.meta)
    reader.replace_input_with(first, moved)
    _leave_out(node)


def _leads_to(start: fx.Node, end: fx.Node) -> bool:
    """Whether ``end`` comes from ``start`` by operations that have one reader each."""
    while start is not end and len(start.users) == 1:
        start = next(iter(start.users))
    return start is end


def _as_pool(graph: Graph, node: fx.Node, operation: Operation) -> None:
    """Writes a mean over height and width as an average pool.

    Raises:
        UserError: It is a mean over something else.
    """
    dims = operation.settings["dim"]
    if sorted(x % 4 for x in dims) != [2, 3] if isinstance(dims, list | tuple) else True:
        raise UserError(
            f"format: {place(node)} is a mean over {dims}; integer networks have means over height "
            "and width, x.mean((2, 3))"
        )
    with graph.fx.inserting_before(node):
        pooled = graph.fx.call_function(F.adaptive_avg_pool2d, (operation.inputs[0], 1))
        if not operation.settings["keepdim"]:
            pooled = graph.fx.call_function(torch.flatten, (pooled, 1))
    node.replace_all_uses_with(pooled)
    graph.fx.erase_node(node)
