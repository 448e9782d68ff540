"""Finds the layers of a network that can be quantized, and counts what they cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError

log = logging.getLogger(__name__)

# Exact types: a subclass may be called in ways that a quantized layer would not see, as
# nn.MultiheadAttention does with the weights of its projections.
QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def count_macs(layer: nn.Module, output: Tensor) -> int:
    """Multiply-accumulates behind one output (1, …) of a convolution or linear layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # Each output element is a dot product with one filter: (C_out, …) has numel / C_out entries.
    return output.numel() * weight.numel() // weight.shape[0]


@torch.no_grad()
def describe_layers(model: nn.Module, image: Tensor) -> tuple[LayerInfo, ...]:
    """Runs one image and lists the quantizable layers in the order of their execution.

    Args:
        model: A float network; left as it was.
        image: (1, C, H, W).

    Raises:
        UserError: The network has no such layer.
    """
    found: dict[str, LayerInfo] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        earlier = found.get(name, LayerInfo(name, 0, 0, 0))  # a shared layer runs more than once
        weight = layer.weight
        assert isinstance(weight, Tensor)
        found[name] = LayerInfo(
            name,
            weight.numel(),
            earlier.macs + count_macs(layer, output),
            earlier.num_inputs + inputs[0].numel(),
        )

    run_with_hooks(
        model,
        image,
        {
            name: partial(record, name)
            for name, module in model.named_modules()
            if type(module) in QUANTIZABLE
        },
    )
    if not found:
        raise UserError("model: it has no convolution or linear layer that could be quantized")
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZABLE) and name not in found:
            why = "its forward() is never called"
            if type(module) not in QUANTIZABLE:
                why = f"{type(module).__name__} is a kind of its own"
            log.warning("%s stays in full precision: %s", name, why)
    return tuple(found.values())


def run_with_hooks(
    model: nn.Module, images: Tensor, hooks: Mapping[str, Callable[..., None]]
) -> Tensor:
    """Runs ``images`` in evaluation mode with forward hooks on some modules; undoes both."""
    modes = {module: module.training for module in model.modules()}
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook) for name, hook in hooks.items()]
    model.eval()
    try:
        output: Tensor = model(images)
        return output
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()
