"""How many of its levels a trained network really uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from adq_train.artifacts import LayerLevels
from adq_train.quantization.base import Quantizer
from adq_train.quantization.layer_weights import used_weight
from adq_train.quantization.prepare import quantized_layers
from adq_train.quantization.watch import run_with_hooks


@torch.no_grad()
def count_levels(model: nn.Module, batches: Iterable[Tensor]) -> tuple[LayerLevels, ...]:
    """Counts the distinct levels that each layer's weights and inputs take.

    Args:
        model: A prepared network.
        batches: Images (N, C, H, W) for the inputs of the layers.
    """
    layers = quantized_layers(model)
    used = {
        name: torch.zeros(len(layer.input_quantizer.levels()), dtype=torch.bool)
        for name, layer in layers.items()
    }

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        used[name] |= _codes(layers[name].input_quantizer, inputs[0])

    hooks: dict[str, Callable[..., None]] = {name: partial(record, name) for name in layers}
    for images in batches:
        run_with_hooks(model, images, hooks)
    return tuple(
        LayerLevels(
            name=name,
            weight_levels=min(len(layer.weight_quantizer.levels()), used_weight(layer).numel()),
            weight_levels_used=_distinct(
                layer.weight_quantizer, _codes(layer.weight_quantizer, used_weight(layer))
            ),
            activation_levels=len(layer.input_quantizer.levels()),
            activation_levels_used=_distinct(layer.input_quantizer, used[name]),
        )
        for name, layer in layers.items()
    )


def _codes(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Which codes occur in ``x``, (K,) bool, on the CPU."""
    codes = quantizer.quantize(x).flatten().int()
    return torch.bincount(codes, minlength=len(quantizer.levels())).cpu() > 0


def _distinct(quantizer: Quantizer, used: Tensor) -> int:
    """How many values the used codes stand for: two levels of a codebook may coincide."""
    return len(torch.unique(quantizer.levels().cpu()[used]))
