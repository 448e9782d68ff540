"""Subclasses of layers: whether their own ``forward()`` computes with what quantizers make."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.quantization.layers import quantized


class _Other(nn.Module):
    """Makes another tensor of a tensor."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.generator).to(x)


@torch.no_grad()
def refusal(
    layer: nn.Module, input: Tensor, others: tuple[Any, ...] = (), named: Mapping[str, Any] = {}
) -> str | None:
    """Why a subclass of a layer cannot be quantized; None where it can.

    Between quantizers that change nothing it must give what it gives without, bit for bit; another
    weight and another input must each change that. All its parameters are drawn anew for this, as
    some begin with zeros that hide the others.

    Args:
        layer: In evaluation mode; left as it was.
        input: Tells the shape of its input.
        others: Further arguments of its ``forward()``.
        named: The same by name.
    """
    other, keep = _Other(torch.Generator().manual_seed(0)), nn.Identity()
    x = other(torch.zeros_like(input, dtype=torch.float32))
    more = {name: value for name, value in named.items() if name != "input"}
    layer, kind = copy.deepcopy(layer).float(), type(layer).__name__
    for parameter in layer.parameters():
        parameter.copy_(other(torch.zeros_like(parameter)))

    def output(weights: nn.Module, inputs: nn.Module) -> Tensor:
        form = quantized(layer, weights, inputs)  # type: ignore[arg-type]
        result: Tensor = form.forward(x, *others, **more)
        return result

    try:
        as_float: Tensor = layer.forward(x, *others, **more)
        if not torch.equal(output(keep, keep), as_float):
            return f"the forward() of {kind} gives other values between quantizers"
        if torch.equal(output(other, keep), as_float):
            return f"the forward() of {kind} does not look at its weight"
        if torch.equal(output(keep, other), as_float):
            return f"the forward() of {kind} does not look at its input"
    except Exception as error:  # somebody's forward() may fail in any way
        return f"the forward() of {kind} fails between quantizers ({error})"
    return None
