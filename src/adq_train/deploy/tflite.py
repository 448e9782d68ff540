"""LiteRT (TensorFlow Lite): the integer network as a .tflite file for integer kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from adq_train.deploy.formats import Source, Written
from adq_train.deploy.integer import (
    IntegerConv2d,
    IntegerLayer,
    IntegerLinear,
    Rescale,
    integer_graph,
    integer_network,
)
from adq_train.deploy.tflite_file import Program, Value, file_bytes
from adq_train.deploy.tflite_ops import Codes, Emitter, Grid, Target, Weighted, Window
from adq_train.errors import UserError
from adq_train.quantization.graph import Operation, pair, place, shape_of

# What a grid passes through: these choose among values and round none.
CHOICES = ("relu", "relu6", "max_pool", "flatten", "slice", "pad")
AVERAGES = ("avg_pool", "adaptive_avg_pool")
UNFINISHED = "the network returns what it makes; only layers and means over an image may be last"


def write(source: Source) -> Written:
    """The content of the file."""
    return written(source, lambda program: program)


def written(source: Source, changed: Callable[[Program], Program]) -> Written:
    """A program, changed, as a file with what it says about itself."""
    network = integer_network(source.network)
    program = changed(program_of(network, source.example))
    last = program.operations[-1].inputs[0]
    assert last is not None
    assert last.scale is not None
    content = file_bytes(program, source.tables.facts())
    return Written(content, network, resolution=float(last.scale) / 2)


def program_of(network: fx.GraphModule, example: Tensor) -> Program:
    """The operations of an integer network: ``images`` (N, H, W, C) and ``logits`` are float32.

    Args:
        network: From :func:`~.integer.integer_network`.
        example: Images (N, C, H, W).

    Raises:
        UserError: LiteRT has no integer operation for a node; it is named.
    """
    return _Walk(network, example).program()


class _Walk:
    """One node after the other, each with the codes that it computes."""

    def __init__(self, network: fx.GraphModule, example: Tensor) -> None:
        self.graph = integer_graph(network)
        ShapeProp(fx.GraphModule(network, self.graph.fx)).propagate(example[:1])
        self.emitter = Emitter()
        self.codes: dict[fx.Node, Codes] = {}

    def program(self) -> Program:
        """The whole."""
        first = output = None
        for node in self.graph:
            operation = self.graph.operation(node)
            try:
                if operation.kind == "output":
                    output = self._output(operation)
                elif operation.kind == "input":
                    images = self.emitter.input("images", _channels_last(shape_of(node)))
                    first = images.value
                    self.codes[node] = images
                else:
                    self.codes[node] = self._emit(node, operation)
                    assert self.codes[node].shape == _channels_last(shape_of(node)), node
            except ValueError as error:
                raise UserError(
                    f"format: LiteRT's integer kernels cannot run {place(node)}: {error}; use "
                    "format=qdq, or onnx for a network in float"
                ) from error
        assert first is not None
        assert output is not None
        return Program(tuple(self.emitter.operations), first, output)

    def _output(self, operation: Operation) -> Value:
        """What the network returns."""
        (last,) = operation.inputs
        x = self.codes[last]
        if len(x.shape) != 2 or x.order:
            raise ValueError("the network returns an image, which LiteRT has in another order")
        return self.emitter.output(x, "logits")

    def _emit(self, node: fx.Node, operation: Operation) -> Codes:
        """Appends what a node does."""
        kind, module, name = operation.kind, operation.module, node.name
        inputs = [self.codes[x] for x in operation.inputs]
        if isinstance(module, Rescale):
            return self.emitter.rescale(inputs[0], _grid(module), name)
        if any(x.value.dtype == "float32" for x in inputs):
            raise ValueError("it works on the images before they have a step")
        if kind in CHOICES:
            return self._choice(node, operation, inputs[0])
        target = self._target(node)
        if isinstance(module, IntegerLayer):
            return self._layer(module, inputs[0], target)
        if kind in AVERAGES:
            return self._average(node, operation, inputs[0], target)
        if target.grid is None:
            raise ValueError(UNFINISHED)
        if kind == "add":
            return self.emitter.add(inputs[0], inputs[1], target.grid, name)
        if kind == "cat":
            if operation.settings["dim"] % len(shape_of(node)) != 1:
                raise ValueError(f"it concatenates along dimension {operation.settings['dim']}")
            return self.emitter.concatenate(inputs, target.grid, name)
        if isinstance(module, nn.BatchNorm2d):
            return self.emitter.scale_channels(inputs[0], *_gain_and_bias(module), target)
        raise ValueError("it is not among the operations that this form has")

    def _target(self, node: fx.Node) -> Target:
        """What becomes of a value that is computed.

        Raises:
            ValueError: It goes on without a step.
        """
        name, relu, ceiling = node.name, False, np.inf
        while True:
            if len(node.users) != 1:
                raise ValueError(f"{len(node.users)} operations read it before it has a step")
            (node,) = node.users
            operation = self.graph.operation(node)
            if operation.kind == "output":
                if ceiling < np.inf:
                    raise ValueError("the network returns what a ReLU6 cuts off")
                return Target(name, None, relu)
            if isinstance(operation.module, Rescale):
                return Target(name, _cut(_grid(operation.module), relu, ceiling), relu)
            if operation.kind not in CHOICES:
                raise ValueError(f"its value has no step before {place(node)}")
            if operation.kind in ("relu", "relu6"):
                relu = True
            if operation.kind == "relu6":
                ceiling = 6.0

    def _layer(self, module: IntegerLayer, x: Codes, target: Target) -> Codes:
        """A layer with weights."""
        bias = None if module.bias is None else module.bias.numpy()
        layer = Weighted(module.codes.numpy(), module.scale.numpy(), bias)
        if isinstance(module, IntegerLinear):
            return self.emitter.linear(x, layer, target)
        assert isinstance(module, IntegerConv2d)
        kernel = (module.codes.shape[2], module.codes.shape[3])
        geometry = map(pair, (module.stride, module.padding, module.dilation))
        return self.emitter.convolution(x, layer, Window(kernel, *geometry), module.groups, target)

    def _choice(self, node: fx.Node, operation: Operation, x: Codes) -> Codes:
        """What chooses among values and rounds none."""
        kind, settings, name = operation.kind, operation.settings, node.name
        if kind == "flatten":
            if (settings["start_dim"], settings["end_dim"]) not in ((1, -1), (1, 3)):
                raise ValueError("it flattens other dimensions than all behind the batch")
            return self.emitter.flatten(x, name)
        if kind == "relu" and x.low >= 0:
            return x
        if x.value.dtype == "int16":
            raise ValueError(UNFINISHED)
        if kind == "max_pool":
            window = _window(settings)
            if pair(settings["dilation"]) != (1, 1):
                raise ValueError("a max pooling with dilation")
            if settings["ceil_mode"]:
                window = window.reaching(x.shape[1:3], shape_of(node)[2:])
            return self.emitter.max_pool(x, window, name)
        if kind == "slice":
            return self.emitter.every(x, _steps(settings["index"]), name)
        if kind == "pad":
            return self.emitter.pad(x, _sides(settings["pad"], len(x.shape)), name)
        if kind == "relu":
            return self.emitter.rescale(x, Grid(float(x.step), 0, x.high), name)
        if x.low >= 0 and x.high * x.step <= 6:
            return x
        grid = self._target(node).grid
        if grid is None:
            raise ValueError(UNFINISHED)
        return self.emitter.rescale(x, _cut(grid, True, 6.0), name)

    def _average(self, node: fx.Node, operation: Operation, x: Codes, target: Target) -> Codes:
        """Means over height and width, of all or of windows."""
        settings, size = operation.settings, x.shape[1:3]
        if operation.kind == "adaptive_avg_pool":
            wanted = shape_of(node)[2:]
            if any(n % m for n, m in zip(size, wanted, strict=True)):
                raise ValueError(f"it has windows of uneven size, from {size} to {wanted}")
            kernel = (size[0] // wanted[0], size[1] // wanted[1])
            window = Window(kernel, kernel)
        else:
            window = _window(settings)
            is_uncounted = not settings["count_include_pad"] and window.padding != (0, 0)
            if settings["ceil_mode"] or settings["divisor_override"] or is_uncounted:
                raise ValueError(
                    "a pooling with ceil_mode, divisor_override, or padding that does not count"
                )
        if window.kernel == size and window.padding == (0, 0):
            return self.emitter.mean(x, True, target)
        if target.grid is None:
            raise ValueError(UNFINISHED)
        return self.emitter.average_pool(x, window, target)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(1, C, H, W) as (1, H, W, C); others as they are."""
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape


def _grid(module: Rescale) -> Grid:
    return Grid(module.step, module.low, module.high)


def _cut(grid: Grid, relu: bool, ceiling: float) -> Grid:
    """What is left of a grid behind a ReLU and below a ceiling; cutting and rounding commute."""
    low = max(grid.low, 0) if relu else grid.low
    return replace(grid, low=low, high=round(min(grid.high, ceiling / grid.step)))


def _window(settings: Mapping[str, Any]) -> Window:
    """The window of a pooling."""
    kernel = pair(settings["kernel_size"])
    stride = pair(settings["stride"]) if settings["stride"] else kernel
    return Window(kernel, stride, pair(settings["padding"]))


def _steps(index: Any) -> tuple[int, int]:
    """The steps of x[:, :, ::a, ::b].

    Raises:
        ValueError: It takes something else.
    """
    parts = [*(index if isinstance(index, tuple) else (index,)), *[slice(None)] * 4][:4]
    steps = [x.step or 1 for x in parts]
    if any((x.start or 0, x.stop) != (0, None) for x in parts) or steps[:2] != [1, 1]:
        raise ValueError("it takes a part of an image, or some of the channels; x[:, :, ::a, ::b]")
    return steps[2], steps[3]


def _sides(pad: Any, rank: int) -> list[tuple[int, int]]:
    """The sides of F.pad, which counts dimensions from the last, with channels last.

    Raises:
        ValueError: It cuts off.
    """
    pairs = [(int(a), int(b)) for a, b in zip(pad[::2], pad[1::2], strict=True)]
    if any(min(pair) < 0 for pair in pairs):
        raise ValueError("a padding that cuts off")
    pairs = [*pairs, *[(0, 0)] * (rank - len(pairs))][::-1]
    return [pairs[0], *pairs[2:], pairs[1]]


def _gain_and_bias(norm: nn.BatchNorm2d) -> tuple[Any, Any]:
    """A batch norm in evaluation mode as a gain and an offset per channel, each (C,).

    Raises:
        ValueError: It keeps no statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics")
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.double()
    bias = -gain * norm.running_mean.double()
    bias = bias if norm.bias is None else bias + norm.bias.double()
    return gain.detach().numpy(), bias.detach().numpy()
