"""Layers that evaluate from tables alone; nothing here knows how they were trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.deploy.layer_tables import LayerTables, Staircase, WeightTable, uniform_grid
from adq_train.quantization.layer_weights import computing_with
from adq_train.quantization.layers import float_form, is_subclass, transposed

# Up to this many thresholds, comparing with each is faster than a search.
FEW = 15


class Steps(nn.Module):
    """Quantizes an input by its staircase.

    Args:
        stairs: Thresholds and levels.
    """

    thresholds: Tensor
    levels: Tensor
    grid_step: Tensor

    def __init__(self, stairs: Staircase) -> None:
        super().__init__()
        self.stairs = stairs
        self.register_buffer("thresholds", stairs.thresholds)
        self.register_buffer("levels", stairs.levels)
        grid = uniform_grid(stairs.levels)
        self.zero_point: int | None = grid[1] if grid else None
        if grid:
            self.register_buffer("grid_step", grid[0])

    def forward(self, x: Tensor) -> Tensor:
        """Maps an input of any shape to levels."""
        return self.values(self.codes(x))

    def codes(self, x: Tensor) -> Tensor:
        """The number of thresholds below each value; the shape and the layout of ``x``."""
        if len(self.thresholds) <= FEW:
            return compare_all(x, self.thresholds)
        return torch.empty_like(x, dtype=torch.int32).copy_(
            torch.bucketize(x.contiguous(), self.thresholds, out_int32=True)
        )

    def values(self, codes: Tensor) -> Tensor:
        """The level of each code."""
        if self.zero_point is not None:
            return (codes.to(self.grid_step.dtype) - self.zero_point) * self.grid_step
        return torch.empty_like(codes, dtype=self.levels.dtype).copy_(
            look_up(self.levels, codes.int())
        )


class Rescale(nn.Module):
    """x → clip(round(x / step), low, high) · step; codes are integers with zero point 0.

    Args:
        step: Positive, a float32 number.
        low: Smallest code: 0, or not below -128.
        high: Largest code: at most 255, or 127 where ``low`` is negative.
    """

    def __init__(self, step: float, low: int, high: int) -> None:
        super().__init__()
        self.step, self.low, self.high = step, low, high

    def forward(self, x: Tensor) -> Tensor:
        """Maps values of any shape to codes times the step."""
        return (x / self.step).round().clamp(self.low, self.high) * self.step

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"step={self.step:.6g}, low={self.low}, high={self.high}"


def compare_all(x: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds (at most 255) lie below each value, uint8, by comparing with each."""
    count = (x > thresholds[0]).to(torch.uint8)
    for index in range(1, len(thresholds)):
        count = count + (x > thresholds[index]).to(torch.uint8)
    return count


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """``table[indices]`` for int32 indices of any shape; ONNX's Gather."""
    return F.embedding(indices, table[:, None]).squeeze(-1)


class Weight(nn.Module):
    """A weight kept as codes of one byte each; looked up whenever it is used.

    Args:
        table: Codes, codebook and scale.
    """

    codes: Tensor
    codebook: Tensor
    scale: Tensor | None

    def __init__(self, table: WeightTable) -> None:
        super().__init__()
        self.register_buffer("codes", table.codes)
        self.register_buffer("codebook", table.codebook)
        scale = table.scale
        if scale is not None:
            scale = scale.view(-1, *[1] * (table.codes.dim() - 1))
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        """The weight, float32."""
        weight = look_up(self.codebook, self.codes.int())
        return weight if self.scale is None else weight * self.scale


class DenseWeight(nn.Module):
    """A weight unpacked once, to float32.

    Args:
        table: Codes, codebook and scale.
    """

    value: Tensor

    def __init__(self, table: WeightTable) -> None:
        super().__init__()
        self.register_buffer("value", table.weight())

    def forward(self) -> Tensor:
        """The weight, float32."""
        return self.value


class PackedLayer(nn.Module):
    """A convolution or linear layer between a staircase and a weight from tables.

    Args:
        layer: The float layer: its geometry and its bias are used, its weight is dropped.
        weight: Gives the weight.
        steps: Quantizes the input.
    """

    def __init__(self, layer: nn.Module, weight: Weight | DenseWeight, steps: Steps) -> None:
        super().__init__()
        del layer.weight
        self.layer = layer
        self.weight = weight
        self.steps = steps

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps an input of the float layer's shape to its output."""
        x, weight = self.steps(input), self.weight()
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        if isinstance(self.layer, nn.ConvTranspose2d):
            return transposed(self.layer, x, weight, self.layer.bias, output_size)
        assert isinstance(self.layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        output: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
        return output


class PackedSubclass(nn.Module):
    """A subclass of a layer, whose own ``forward()`` meets the tensors of its tables.

    Args:
        layer: The float layer; its weight is dropped.
        weight: Gives the weight.
        steps: Quantizes the input.
    """

    def __init__(self, layer: nn.Module, weight: Weight | DenseWeight, steps: Steps) -> None:
        super().__init__()
        layer.register_parameter("weight", None)
        self.layer = layer
        self.weight = weight
        self.steps = steps

    def forward(self, input: Tensor, *others: Any, **named: Any) -> Tensor:
        """Maps what the float layer maps."""
        with computing_with(self.layer, {"weight": self.weight()}):
            output: Tensor = self.layer(self.steps(input), *others, **named)
            return output


class PackedEmbedding(nn.Module):
    """An embedding with a weight from tables.

    Args:
        weight: Gives the weight.
    """

    def __init__(self, weight: Weight | DenseWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """Maps indices (…) to rows of the weight (…, embedding_dim)."""
        return F.embedding(input, self.weight())


def packed_layer(
    layer: nn.Module, tables: LayerTables, dense: bool = True
) -> PackedLayer | PackedSubclass | PackedEmbedding:
    """The evaluation form of a layer.

    Args:
        layer: One that can be quantized, float or quantized; taken over.
        tables: Its tables.
        dense: Whether to unpack the weight once; otherwise it stays codes of one byte each.
    """
    weight = DenseWeight(tables.weight) if dense else Weight(tables.weight)
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding(weight)
    if is_subclass(layer):
        return PackedSubclass(float_form(layer), weight, Steps(tables.input))
    return PackedLayer(layer, weight, Steps(tables.input))
