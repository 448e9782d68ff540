"""Finds the layers of a network that can be quantized, and counts what they cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError
from adq_train.quantization.layers import QUANTIZED

log = logging.getLogger(__name__)


def count_macs(layer: nn.Module, input: Tensor, output: Tensor) -> int:
    """Multiply-accumulates behind one output (1, …) of a convolution or linear layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # Each output element is a dot product with one filter: (C_out, …) has numel / C_out entries.
    # In a transposed convolution it is each input element that meets a filter, (C_in, …).
    elements = input if isinstance(layer, nn.ConvTranspose2d) else output
    return elements.numel() * weight.numel() // weight.shape[0]


@torch.no_grad()
def describe_layers(model: nn.Module, image: Tensor) -> tuple[LayerInfo, ...]:
    """Runs one image and lists the quantizable layers in the order of their execution.

    Args:
        model: A float network; left as it was.
        image: (1, C, H, W).

    Raises:
        UserError: The network has no such layer, or is one itself.
    """
    if type(model) in QUANTIZED:
        raise UserError(
            "model: it is a single layer, which cannot be replaced; wrap it in a module"
        )
    found: dict[str, LayerInfo] = {}
    name_of: dict[Tensor, str] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # A weight that is used more than once, by one layer or by several, counts once.
        name = name_of.setdefault(weight, name)
        earlier = found.get(name, LayerInfo(name, 0, 0, 0))
        found[name] = LayerInfo(
            name,
            weight.numel(),
            earlier.macs + count_macs(layer, inputs[0], output),
            earlier.num_inputs + inputs[0].numel(),
        )

    run_with_hooks(
        model,
        image,
        {
            name: partial(record, name)
            for name, module in model.named_modules()
            if type(module) in QUANTIZED
        },
    )
    if not found:
        raise UserError("model: it has no convolution or linear layer that could be quantized")
    for name, module in model.named_modules():
        # Scales and offsets, of whatever shape, have one axis that is longer than 1.
        matrices = [
            x for x in module.parameters(recurse=False) if x.numel() > max(x.shape, default=1)
        ]
        if not all(x in name_of for x in matrices):
            why = f"weights of a {type(module).__name__} are not quantized"
            if type(module) in QUANTIZED:
                why = "its forward() is never called"
            log.warning("%s stays in full precision: %s", name or "the model's own weight", why)
    return tuple(found.values())


def same_weight(model: nn.Module, name: str) -> list[str]:
    """The layers that use the weight of the layer ``name``, itself first, one name for each."""
    weight = model.get_submodule(name).weight
    others = [
        other
        for other, module in model.named_modules()
        if type(module) in QUANTIZED and module.weight is weight and other != name
    ]
    return [name, *others]


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
