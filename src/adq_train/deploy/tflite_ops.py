"""Integer layers as LiteRT operations on codes.

A code is an integer q that stands for q · step. LiteRT keeps q + zero point in int8. The zero
point is put where the largest code is 127: there the kernels saturate, which is the upper clip,
exact and at no cost; the lower clip at 0 is the ReLU that they fuse. What is left, a lower clip
elsewhere, takes one more operation.

From one grid to another it goes by ADD with a zero: ADD shifts codes up by 20 bits before it
scales them, so every set of kernels rounds it right. QUANTIZE does not: XNNPACK's has 8 fractional
bits, the others' rounds twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adq_train.deploy.integer import LARGEST_BIAS
from adq_train.deploy.tflite_file import Operation, Value

INT8_LOWEST, INT8_TOP, INT16_TOP = -128, 127, 32767
INT8_SPAN = 255
FUSED_RELU = {"fusedActivationFunction": 1}
SAME, VALID = 0, 1


@dataclass(frozen=True)
class Grid:
    """Values k · step with low ≤ k ≤ high; at most 256 of them, 0 among them."""

    step: float
    low: int
    high: int


@dataclass(frozen=True)
class Target:
    """What becomes of a computed value.

    Attributes:
        name: Of its tensor.
        grid: What it is rounded to; None for 16 bits, whose largest code stands for a bound of all
            that the layer can compute.
        relu: Whether it is cut at 0 before.
    """

    name: str
    grid: Grid | None
    relu: bool = False


@dataclass(frozen=True)
class Codes:
    """A computed tensor.

    Attributes:
        value: In the file, channels last.
        low: No code is smaller.
        high: No code is larger.
        order: (C, H, W) where these were flattened with the channels last; torch has them first.
    """

    value: Value
    low: int = 0
    high: int = 0
    order: tuple[int, int, int] | None = None

    @property
    def step(self) -> np.float32:
        """What a code of 1 stands for."""
        assert self.value.scale is not None
        step: np.float32 = np.float32(self.value.scale)
        return step

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, H, W, C) or (1, C)."""
        return self.value.shape

    @property
    def largest(self) -> int:
        """The largest size of a code."""
        return max(-self.low, self.high)


@dataclass(frozen=True)
class Weighted:
    """The integers of a convolution or a linear layer.

    Attributes:
        codes: (C_out, …) as torch has them, each within -127 … 127.
        scale: (C_out,), positive.
        bias: (C_out,), or None; at most 2^30 times the scale and the step of the input.
    """

    codes: NDArray[Any]
    scale: NDArray[Any]
    bias: NDArray[Any] | None


@dataclass(frozen=True)
class Window:
    """What a convolution or a pooling looks at, each as (height, width).

    Attributes:
        kernel: Its size.
        stride: From one to the next.
        padding: On either side.
        dilation: Of the kernel.
        beyond: How much padding there is more behind than before.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    beyond: tuple[int, int] = (0, 0)

    def output(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of what it makes of an image of this size."""
        height, width = (
            (size[i] + sum(self.sides(i)) - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return height, width

    def reaching(self, size: Sequence[int], wanted: Sequence[int]) -> Window:
        """The same with as much padding behind as it takes to make an image of a wanted size."""
        height, width = (
            (wanted[i] - 1) * self.stride[i] + self.kernel[i] - size[i] - 2 * self.padding[i]
            for i in (0, 1)
        )
        return replace(self, beyond=(max(height, 0), max(width, 0)))

    def sides(self, i: int) -> tuple[int, int]:
        """Padding before and behind, of height (0) or width (1)."""
        return self.padding[i], self.padding[i] + self.beyond[i]

    def is_same(self, size: Sequence[int]) -> bool:
        """Whether LiteRT's padding SAME, which it works out itself, is this padding."""
        for i in (0, 1):
            reach = (-(-size[i] // self.stride[i]) - 1) * self.stride[i] + 1
            total = max(reach + self.dilation[i] * (self.kernel[i] - 1) - size[i], 0)
            if (total // 2, total - total // 2) != self.sides(i):
                return False
        return True

    def options(self, padding: int) -> dict[str, int]:
        """Its fields in the schema."""
        return {"padding": padding, "strideH": self.stride[0], "strideW": self.stride[1]}


# Appends the operation that computes a value, with a fused ReLU or without.
Append = Callable[[Value, bool], None]


class Emitter:
    """Appends operations, one after the other."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def input(self, name: str, shape: tuple[int, ...]) -> Codes:
        """The network's input, in float."""
        return Codes(Value(name, shape, "float32"))

    def output(self, x: Codes, name: str) -> Value:
        """The network's output, in float."""
        value = Value(name, x.shape, "float32")
        self._append("DEQUANTIZE", 2 if x.value.dtype == "int8" else 3, (x.value,), value)
        return value

    def rescale(self, x: Codes, grid: Grid, name: str) -> Codes:
        """The nearest values of a grid."""
        if x.value.dtype == "float32":

            def append(value: Value, relu: bool) -> None:
                self._append("QUANTIZE", 1, (x.value,), value)

            return self._on_grid(grid, name, x, append, fuses=False)
        if np.float32(grid.step) == x.step and grid.low <= x.low and x.high <= grid.high:
            return x
        return self._on_grid(grid, name, x, self._adding(x, self._zero(x)), positive=x.low >= 0)

    def add(self, a: Codes, b: Codes, grid: Grid, name: str) -> Codes:
        """The sum of two tensors of one shape."""
        if a.shape != b.shape or a.order != b.order:
            raise ValueError(f"it adds {a.shape} and {b.shape}")
        positive = a.low >= 0 and b.low >= 0
        return self._on_grid(grid, name, a, self._adding(a, b.value), positive=positive)

    def concatenate(self, parts: Sequence[Codes], grid: Grid, name: str) -> Codes:
        """Tensors one behind the other along the channels."""
        if any(x.order for x in parts):
            raise ValueError("it concatenates what was flattened over height and width")
        parts = [self.rescale(x, grid, f"{name}/{i}") for i, x in enumerate(parts)]
        zero_point = INT8_TOP - grid.high
        parts = [self._moved(x, zero_point) for x in parts]
        shape = (*parts[0].shape[:-1], sum(x.shape[-1] for x in parts))
        value = replace(parts[0].value, name=name, shape=shape)
        inputs = tuple(x.value for x in parts)
        self._append("CONCATENATION", 2, inputs, value, {"axis": len(shape) - 1})
        return Codes(value, min(x.low for x in parts), max(x.high for x in parts))

    def convolution(
        self, x: Codes, layer: Weighted, window: Window, groups: int, target: Target
    ) -> Codes:
        """A convolution of (1, H, W, C)."""
        channels, each = layer.codes.shape[:2]
        x, window, padding = self._padded(x, window, target.name)
        shape = (1, *window.output(x.shape[1:3]), channels)
        options = {
            **window.options(padding),
            "dilationHFactor": window.dilation[0],
            "dilationWFactor": window.dilation[1],
        }
        if each == 1 and groups == x.shape[-1] and groups > 1:
            options["depthMultiplier"] = channels // groups
            weight = layer.codes.transpose(1, 2, 3, 0)
            kind = _Layer("DEPTHWISE_CONV_2D", {"int8": 3, "int16": 5}, weight, 3, options)
        else:
            weight = layer.codes.transpose(0, 2, 3, 1)
            versions = {"int8": 3, "int16": 4} if groups == 1 else {"int8": 6, "int16": 6}
            kind = _Layer("CONV_2D", versions, weight, 0, options)
        return self._layer(x, layer, kind, shape, target)

    def linear(self, x: Codes, layer: Weighted, target: Target) -> Codes:
        """A linear layer on (1, C)."""
        if len(x.shape) != 2:
            raise ValueError(f"a linear layer on {len(x.shape)} dimensions")
        weight = layer.codes
        if x.order:
            weight = weight.reshape(-1, *x.order).transpose(0, 2, 3, 1).reshape(weight.shape)
        kind = _Layer("FULLY_CONNECTED", {"int8": 4, "int16": 7}, weight, 0, {})
        return self._layer(x, layer, kind, (1, len(weight)), target)

    def scale_channels(
        self, x: Codes, gain: NDArray[Any], bias: NDArray[Any], target: Target
    ) -> Codes:
        """A gain and an offset for each channel of (1, H, W, C): a depthwise 1 × 1 convolution."""
        # A channel that is all but switched off gets a scale that can carry its offset.
        least = np.maximum(np.abs(bias) / (LARGEST_BIAS * float(x.step)), 1e-30)
        scale = np.maximum(np.abs(gain) / INT8_TOP, least)
        layer = Weighted(np.rint(gain / scale).reshape(-1, 1, 1, 1), scale, bias)
        return self.convolution(x, layer, Window((1, 1), (1, 1)), len(gain), target)

    def average_pool(self, x: Codes, window: Window, target: Target) -> Codes:
        """Means of windows, padding counted: a depthwise convolution, which rounds once.

        AVERAGE_POOL_2D would round to the grid of its input first.
        """
        channels, area = x.shape[-1], window.kernel[0] * window.kernel[1]
        # Weights of 127: where kernels round twice, they round large sums better than small ones.
        codes = np.full((channels, 1, *window.kernel), INT8_TOP)
        layer = Weighted(codes, np.full(channels, 1 / (INT8_TOP * area)), None)
        return self.convolution(x, layer, window, channels, target)

    def every(self, x: Codes, steps: tuple[int, int], name: str) -> Codes:
        """Every so many-th pixel: a depthwise 1 × 1 convolution with weights of 1.

        XNNPACK has no STRIDED_SLICE with a step; this stays on its kernels.
        """
        layer = Weighted(np.ones((x.shape[-1], 1, 1, 1)), np.ones(x.shape[-1]), None)
        target = Target(name, Grid(float(x.step), x.low, x.high))
        return self.convolution(x, layer, Window((1, 1), steps), x.shape[-1], target)

    def mean(self, x: Codes, keep: bool, target: Target) -> Codes:
        """The mean over height and width.

        Args:
            x: (1, H, W, C).
            keep: Whether these stay as dimensions of 1.
            target: What becomes of it.
        """
        name, shape = target.name, (1, 1, 1, x.shape[-1]) if keep else (1, x.shape[-1])
        source, version = (x, 2) if target.grid else (self._wide(x, name), 3)
        axes = Value(f"{name}/axes", (2,), "int32", data=np.array([1, 2]))

        def append(value: Value, relu: bool) -> None:
            self._append("MEAN", version, (source.value, axes), value, {"keepDims": keep})

        if not target.grid:
            if target.relu and x.low < 0:
                raise ValueError("the network returns it behind a ReLU")
            return self._on_wide(float(x.largest * x.step), name, shape, append)
        like, positive = Codes(replace(x.value, shape=shape)), x.low >= 0
        return self._on_grid(target.grid, name, like, append, positive, fuses=False)

    def max_pool(self, x: Codes, window: Window, name: str) -> Codes:
        """Largest values of windows."""
        x, window, padding = self._padded(x, window, name, x.low)
        shape = (1, *window.output(x.shape[1:3]), x.shape[-1])
        value = replace(x.value, name=name, shape=shape)
        size = {"filterHeight": window.kernel[0], "filterWidth": window.kernel[1]}
        self._append("MAX_POOL_2D", 2, (x.value,), value, {**window.options(padding), **size})
        return replace(x, value=value)

    def pad(self, x: Codes, sides: Sequence[tuple[int, int]], name: str, code: int = 0) -> Codes:
        """Codes on all sides.

        Args:
            x: Any shape.
            sides: How many before and behind, for each dimension.
            name: Of the result.
            code: Which one. Operation PAD takes 0.
        """
        shape = tuple(n + a + b for n, (a, b) in zip(x.shape, sides, strict=True))
        value = replace(x.value, name=name, shape=shape)
        numbers = Value(f"{name}/sides", (len(shape), 2), "int32", data=np.array(sides))
        if code == 0:
            self._append("PAD", 2, (x.value, numbers), value)
        else:
            content = np.array([code + x.value.zero_point])
            fill = replace(x.value, name=f"{name}/fill", shape=(1,), data=content)
            self._append("PADV2", 2, (x.value, numbers, fill), value)
        return Codes(value, min(x.low, code), max(x.high, code), x.order)

    def flatten(self, x: Codes, name: str) -> Codes:
        """(1, H, W, C) as (1, H · W · C)."""
        if len(x.shape) == 2:
            return x
        _, height, width, channels = x.shape
        shape = (1, height * width * channels)
        order = (channels, height, width) if height * width > 1 else None
        value, target = replace(x.value, name=name, shape=shape), np.array([-1, shape[1]])
        numbers = Value(f"{name}/shape", (2,), "int32", data=target)
        self._append("RESHAPE", 1, (x.value, numbers), value, {"newShape": target.tolist()})
        return replace(x, value=value, order=order)

    # What these share.

    def _append(
        self,
        kind: str,
        version: int,
        inputs: tuple[Value | None, ...],
        output: Value,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.operations.append(Operation(kind, version, inputs, output, options or {}))

    def _on_grid(
        self,
        grid: Grid,
        name: str,
        like: Codes,
        append: Append,
        positive: bool = False,
        fuses: bool = True,
    ) -> Codes:
        """What is computed, on a grid.

        Args:
            grid: The grid.
            name: Of the result.
            like: Has its shape.
            append: Appends the operation.
            positive: Whether what is computed is known to be 0 or more.
            fuses: Whether the operation can fuse a ReLU.
        """
        low = max(grid.low, 0) if positive else grid.low
        value = Value(name, like.shape, "int8", np.float32(grid.step), INT8_TOP - grid.high)
        result = Codes(value, low, grid.high, like.order)
        if positive or grid.high - grid.low == INT8_SPAN:
            append(value, False)
        elif fuses and grid.low == 0:
            append(value, True)
        else:
            # Saturating below at first, above then: the step is one, so the second rounds nothing.
            first = replace(value, name=f"{name}/low", zero_point=INT8_LOWEST - grid.low)
            append(first, False)
            self._adding(Codes(first), self._zero(Codes(first)))(value, False)
        return result

    def _adding(self, x: Codes, other: Value) -> Append:
        def append(value: Value, relu: bool) -> None:
            self._append("ADD", 2, (x.value, other), value, FUSED_RELU if relu else {})

        return append

    def _zero(self, x: Codes) -> Value:
        """A zero to add."""
        return Value(f"{x.value.name}/zero", (1,), "int8", x.step, data=np.zeros(1))

    def _moved(self, x: Codes, zero_point: int) -> Codes:
        """The same codes around another zero point."""
        if x.value.zero_point == zero_point:
            return x
        value = replace(x.value, name=f"{x.value.name}/moved", zero_point=zero_point)
        self._adding(x, self._zero(x))(value, False)
        return replace(x, value=value)

    def _wide(self, x: Codes, name: str) -> Codes:
        """The same codes in 16 bits, exactly, by way of float: older runtimes know no other."""
        real = Value(f"{name}/float", x.shape, "float32")
        value = replace(x.value, name=f"{name}/wide", dtype="int16", zero_point=0)
        self._append("DEQUANTIZE", 2, (x.value,), real)
        self._append("QUANTIZE", 2, (real,), value)
        return replace(x, value=value)

    def _on_wide(
        self, bound: float, name: str, shape: tuple[int, ...], append: Append, relu: bool = False
    ) -> Codes:
        """What is computed, in 16 bits, whose largest code stands for a bound of it."""
        value = Value(name, shape, "int16", np.float32(max(bound, 1e-30) / INT16_TOP))
        append(value, relu)
        return Codes(value, 0 if relu else -INT16_TOP, INT16_TOP)

    def _padded(
        self, x: Codes, window: Window, name: str, code: int = 0
    ) -> tuple[Codes, Window, int]:
        """An input, padded if LiteRT does not itself; the window then, and the kind of padding."""
        sides = [(0, 0), window.sides(0), window.sides(1), (0, 0)]
        if not any(map(sum, sides)):
            return x, window, VALID
        if window.is_same(x.shape[1:3]):
            return x, window, SAME
        padded = self.pad(x, sides, f"{name}/padded", code)
        return padded, replace(window, padding=(0, 0), beyond=(0, 0)), VALID

    def _layer(
        self, x: Codes, layer: Weighted, kind: _Layer, shape: tuple[int, ...], target: Target
    ) -> Codes:
        """A layer with weights and a bias."""
        scale, weight = layer.scale.astype(np.float32), kind.weight
        source, dtypes = (x, ("int8", "int32")) if target.grid else (None, ("int16", "int64"))
        source = source or self._wide(x, target.name)
        name, steps = target.name, x.step * scale
        bias = np.zeros(len(scale)) if layer.bias is None else np.rint(layer.bias / steps)
        factors = Value(f"{name}/weight", weight.shape, "int8", scale, 0, kind.axis, weight)
        offsets = Value(f"{name}/bias", (len(scale),), dtypes[1], steps, data=bias)

        def append(value: Value, relu: bool) -> None:
            options = {**kind.options, **(FUSED_RELU if relu else {})}
            inputs = (source.value, factors, offsets)
            self._append(kind.kind, kind.versions[dtypes[0]], inputs, value, options)

        if target.grid:
            return self._on_grid(target.grid, name, Codes(replace(x.value, shape=shape)), append)
        flat = np.moveaxis(weight, kind.axis, 0).reshape(len(scale), -1).astype(np.float64)
        up, down = flat.clip(min=0).sum(1), flat.clip(max=0).sum(1)
        ends = [up * a + down * b + bias for a, b in ((x.high, x.low), (x.low, x.high))]
        bound = float((np.abs(ends) * steps).max())
        return self._on_wide(bound, name, shape, append, target.relu)


@dataclass(frozen=True)
class _Layer:
    """How a layer is written.

    Attributes:
        kind: In the schema.
        versions: By the type of its input.
        weight: As LiteRT has it.
        axis: Of the weight's channels.
        options: In the schema.
    """

    kind: str
    versions: dict[str, int]
    weight: NDArray[Any]
    axis: int
    options: dict[str, Any]
