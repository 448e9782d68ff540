"""A network's ``forward()`` as a graph of few kinds of operations, by whichever name it calls them.

What is inserted into a network, or written as another runtime's graph, follows this form.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from adq_train.errors import UserError
from adq_train.quantization.base import Quantizer
from adq_train.quantization.layer_weights import evaluating
from adq_train.quantization.layers import QUANTIZED, QuantSubclass, quantized_kind


@dataclass(frozen=True)
class Kind:
    """One kind of operation, and the names that torch has for it.

    Attributes:
        modules: Classes of modules, exactly these.
        functions: Functions and operators.
        methods: Names of a tensor's methods.
        settings: What follows the operands, in order, with defaults; modules have attributes of
            these names.
    """

    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


LAYERS: tuple[type[nn.Module], ...] = (*QUANTIZED.values(), QuantSubclass)
_WINDOW = {"kernel_size": None, "stride": None, "padding": 0}
KINDS = {
    "batch_norm": Kind((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    "relu": Kind((nn.ReLU,), (F.relu, torch.relu, F.relu_, torch.relu_), ("relu", "relu_")),
    "relu6": Kind((nn.ReLU6,), (F.relu6,)),
    "max_pool": Kind(
        (nn.MaxPool2d,),
        (F.max_pool2d, torch.max_pool2d),
        settings={**_WINDOW, "dilation": 1, "ceil_mode": False, "return_indices": False},
    ),
    "avg_pool": Kind(
        (nn.AvgPool2d,),
        (F.avg_pool2d,),
        settings={
            **_WINDOW, "ceil_mode": False, "count_include_pad": True, "divisor_override": None,
        },
    ),
    "adaptive_avg_pool": Kind(
        (nn.AdaptiveAvgPool2d,), (F.adaptive_avg_pool2d,), settings={"output_size": None}
    ),
    "mean": Kind((), (torch.mean,), ("mean",), {"dim": None, "keepdim": False}),
    "flatten": Kind(
        (nn.Flatten,), (torch.flatten,), ("flatten",), {"start_dim": 0, "end_dim": -1}
    ),
    "identity": Kind(
        (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
        (F.dropout, F.dropout2d),
        ("contiguous",),
    ),
    "slice": Kind((), (operator.getitem,), (), {"index": None}),
    "pad": Kind((), (F.pad,), (), {"pad": None, "mode": "constant", "value": None}),
    "add": Kind((), (operator.add, operator.iadd, torch.add), ("add", "add_")),
    "cat": Kind((), (torch.cat, torch.concat, torch.concatenate), (), {"dim": 0}),
}  # fmt: skip
_BY_MODULE = {kind: name for name, x in KINDS.items() for kind in x.modules}
_BY_FUNCTION = {function: name for name, x in KINDS.items() for function in x.functions}
_BY_METHOD = {method: name for name, x in KINDS.items() for method in x.methods}


@dataclass(frozen=True)
class Operation:
    """A node of a graph, read.

    Attributes:
        kind: A name of :data:`KINDS`; or ``input``, ``output``, ``layer`` (quantized, or to be),
            ``leaf`` (a quantizer, or a class that was given), or ``other``.
        inputs: The nodes that it works on.
        settings: By name.
        module: The module that it calls, or None.
    """

    kind: str
    inputs: tuple[fx.Node, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None


class Tracer(fx.Tracer):
    """Follows ``forward()`` down to torch's own modules and to ours."""

    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one operation of the graph."""
        own = isinstance(m, self.leaves) or quantized_kind(m) is not None
        return own or super().is_leaf_module(m, module_qualified_name)


def _first_size(size: Any) -> bool:
    """Whether a value is the first size of a tensor: ``x.size(0)``, ``x.shape[0]``."""
    if not isinstance(size, fx.Node):
        return False
    if size.op == "call_method" and size.target == "size":
        return bool(size.args[1:] == (0,))
    if size.target is not operator.getitem or size.args[1] != 0:
        return False
    sizes = size.args[0]
    assert isinstance(sizes, fx.Node)
    shape = sizes.target is getattr and sizes.args[1] == "shape"
    return bool(sizes.target == "size" or shape)


def _to_vectors(node: fx.Node) -> bool:
    """Whether a node makes vectors (N, features): ``x.view(x.size(0), -1)``, ``x.view(-1, 400)``.

    That 400 is the number of features is for the shape of a result to tell.
    """
    method = node.op == "call_method" and node.target in ("view", "reshape")
    if not (method or node.target is torch.reshape):
        return False
    sizes: Any = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = sizes[0]
    return len(sizes) == 2 and (sizes[0] == -1 or _first_size(sizes[0]))


class Graph:
    """The graph of a network's ``forward()``, in evaluation mode.

    Args:
        network: Float, quantized or packed; left as it was.
        leaves: Classes of modules that are not looked into, besides torch's own, quantized layers
            and quantizers.
        layers: Those among them that count as quantized layers.

    Raises:
        UserError: The graph cannot be followed; the place is named.
    """

    def __init__(
        self,
        network: nn.Module,
        leaves: tuple[type[nn.Module], ...] = (),
        layers: tuple[type[nn.Module], ...] = (),
    ) -> None:
        self.network = network
        self.layers = (*LAYERS, *layers)
        self.leaves: tuple[type[nn.Module], ...] = (Quantizer, *leaves, *self.layers)
        self.fx = self._traced()
        self._flatten_views()
        for node in self.fx.nodes:
            if node.op == "call_module" and not node.args and set(node.kwargs) == {"input"}:
                node.args, node.kwargs = (node.kwargs["input"],), {}

    def _traced(self) -> fx.Graph:
        """The graph, which must be the same in training as in evaluation."""
        graphs = []
        try:
            with evaluating(self.network):
                for training in (True, False):
                    self.network.train(training)
                    graphs.append(Tracer(self.leaves).trace(self.network))
                    for name in [x for x in vars(self.network) if x.startswith("_tensor_constant")]:
                        delattr(self.network, name)  # which the tracer has left
        except Exception as error:  # a forward() may do anything with the proxies that it gets
            reason = " ".join(str(error).split())
            raise UserError(
                f"model: its forward() cannot be followed ({reason}); branches and loops must not "
                "depend on values or sizes of tensors, nor on whether an argument is None"
            ) from error
        for first, second in zip(*(list(x.nodes) for x in graphs), strict=False):
            if first.format_node() != second.format_node():
                raise UserError(
                    f"model: {place(second)} is another operation in training than in evaluation; "
                    "put it into a module, as nn.Dropout does"
                )
        return graphs[1]

    def _flatten_views(self) -> None:
        """Makes flatten(1) of a reshape to a batch of vectors, which asks for sizes."""
        for node in list(self.fx.nodes):
            if _to_vectors(node):
                with self.fx.inserting_before(node):
                    flat = self.fx.call_function(torch.flatten, (node.args[0], 1))
                flat.meta = dict(node.meta)
                node.replace_all_uses_with(flat)
                self.fx.erase_node(node)
        for node in reversed(list(self.fx.nodes)):  # the sizes that were asked for
            if not node.users and node.op not in ("placeholder", "output"):
                self.fx.erase_node(node)

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(list(self.fx.nodes))

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.network.get_submodule(str(node.target))

    def operation(self, node: fx.Node) -> Operation:
        """What a node does."""
        operands = tuple(x for x in node.args if isinstance(x, fx.Node))
        if node.op in ("placeholder", "output"):
            kind = {"placeholder": "input", "output": "output"}[node.op]
            return Operation(kind, tuple(node.all_input_nodes))
        if node.op == "call_module":
            module = self.module(node)
            if isinstance(module, nn.Embedding):  # what reads its indices is no arithmetic
                return Operation("other", operands, module=module)
            if isinstance(module, self.layers) or quantized_kind(module):
                return Operation("layer", operands, module=module)
            if isinstance(module, self.leaves):
                return Operation("leaf", operands, module=module)
            name = _BY_MODULE.get(type(module), "other")
            names = KINDS[name].settings if name in KINDS else ()
            settings = {x: getattr(module, x) for x in names}
            name = name if _is_plain(name, settings, 1) else "other"
            return Operation(name, operands, settings, module)
        known: Mapping[Any, str] = _BY_FUNCTION if node.op == "call_function" else _BY_METHOD
        name = known.get(node.target, "other") if node.op != "get_attr" else "other"
        return _of_function(name, node)


def _of_function(name: str, node: fx.Node) -> Operation:
    """A call of a function or a method; ``other`` where its arguments are not those of its kind."""
    other = Operation("other", tuple(node.all_input_nodes))
    if name == "other":
        return other
    known = {"input", "tensors", "other", "inplace", "p", "training", *KINDS[name].settings}
    if not node.kwargs.keys() <= known:
        return other
    count = 2 if name == "add" else 1
    operands, rest = list(node.args[:count]), node.args[count:]
    operands += [node.kwargs[x] for x in ("input", "tensors", "other") if x in node.kwargs]
    if name == "cat":
        if not isinstance(operands[0], tuple | list):
            return other
        operands = list(operands[0])
    defaults = KINDS[name].settings
    settings = {**defaults, **dict(zip(defaults, rest, strict=False))}
    settings |= {k: v for k, v in node.kwargs.items() if k in defaults}
    if name == "mean" and isinstance(settings["dim"], int):
        settings["dim"] = tuple(x for x in rest if type(x) is int) or (settings["dim"],)
        settings["keepdim"] = settings["keepdim"] is True  # x.mean(2, 3) has none
    nodes = tuple(x for x in operands if isinstance(x, fx.Node))
    if len(nodes) < len(operands) or not nodes or not _is_plain(name, settings, len(nodes)):
        return other
    return Operation(name, nodes, settings)


def _is_plain(name: str, settings: Mapping[str, Any], count: int) -> bool:
    """Whether a call does no more than what its kind stands for."""
    if name == "slice":
        index = settings["index"]
        return all(isinstance(x, slice) for x in (index if isinstance(index, tuple) else [index]))
    if name == "pad":
        return settings["mode"] == "constant" and settings["value"] in (None, 0)
    if name == "max_pool":
        return not settings["return_indices"]
    return count == 2 if name == "add" else True


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A setting of a window as (height, width)."""
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node gives, once ``ShapeProp`` has been through its graph."""
    return tuple(node.meta["tensor_meta"].shape)


def place(node: fx.Node) -> str:
    """A node as a message names it: what it calls, and the module whose ``forward()`` calls it."""
    what = str(node.target) if isinstance(node.target, str) else node.target.__name__
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inside = [x[0] for x in stack if x[0] and x[0] != what]
    return f"{what} (node {node.name}{f' in {inside[-1]}' if inside else ''})"
