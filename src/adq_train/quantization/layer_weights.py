"""The weight that a layer really uses: a parameter of its own, or one that is made anew each time.

Weight norm, spectral norm and pruning compute the weight from other tensors before every use:
as a parametrization (a property of a class that PyTorch generates) or, in their older form, in a
hook before ``forward()``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from adq_train.errors import UserError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode during a with block; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def kept_weight(layer: nn.Module) -> Tensor | None:
    """The layer's weight where it is a parameter or a buffer, or None where it is made anew."""
    weight = layer._parameters.get("weight")
    return layer._buffers.get("weight") if weight is None else weight


def weight_identity(layer: nn.Module) -> object:
    """What two layers have in common if, and only if, they use the same weight."""
    weight = kept_weight(layer)
    return layer if weight is None else weight


def weight_sources(layer: nn.Module) -> list[Tensor]:
    """The tensors that whoever uses the layer's weight reads."""
    weight = kept_weight(layer)
    weight = vars(layer).get("weight") if weight is None else weight
    if weight is None and is_parametrized(layer, "weight"):
        return list(layer.get_submodule("parametrizations.weight").parameters())
    return [] if weight is None else [weight]


def used_weight(layer: nn.Module) -> Tensor:
    """The weight that the next ``forward()`` in evaluation mode will use, in float32.

    Args:
        layer: Float or quantized. Its weight itself, if that is a float32 parameter; otherwise a
            tensor that gradients flow through.

    Raises:
        UserError: Something outside the layer sets its weight, so that none can be foretold.
    """
    weight: Any = kept_weight(layer)
    if weight is None:
        with evaluating(layer):
            if "weight" in vars(layer) and not _makers(layer):
                raise UserError(
                    f"model: the weight of {layer} is a plain tensor that something else sets; "
                    "make it a parameter or a buffer, or compute it with "
                    "torch.nn.utils.parametrize.register_parametrization"
                )
            weight = layer.weight
    used: Tensor = weight.float()
    return used


def _makers(layer: nn.Module) -> list[int]:
    """The keys of the hooks that make the layer's tensors; they have made them anew afterwards."""
    makers = []
    for key, hook in list(layer._forward_pre_hooks.items()):
        before = made_by_hooks(layer)
        try:
            hook(layer, ())
        except Exception:  # it wants an input, so it is not one that makes a weight
            continue
        if any(value is not before[name] for name, value in made_by_hooks(layer).items()):
            makers.append(key)
    return makers


def made_by_hooks(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's tensors that are plain attributes, as hooks leave them, by name."""
    return {name: vars(layer)[name] for name in ("weight", "bias") if name in vars(layer)}


@torch.no_grad()
def with_kept_weight(layer: nn.Module) -> nn.Module:
    """A layer that computes the same, with parameters instead of tensors that are made anew."""
    kind: type[nn.Module] = type_before_parametrizations(layer)
    new = kind.__new__(kind)
    new.__dict__.update({name: copy.copy(value) for name, value in vars(layer).items()})
    with evaluating(layer):
        for key in _makers(layer):
            del new._forward_pre_hooks[key]
        made = made_by_hooks(layer)
        if is_parametrized(layer):
            names = [name for name, _ in layer.get_submodule("parametrizations").named_children()]
            made |= {name: getattr(layer, name) for name in names}
            del new._modules["parametrizations"]
    for name, value in made.items():
        new.__dict__.pop(name, None)
        new._parameters[name] = nn.Parameter(value.detach().clone())
    return new


@contextmanager
def computing_with(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Other tensors in the place of a layer's weight and bias during a with block.

    Args:
        layer: Its parameters themselves stay as they are.
        tensors: By name, ``weight`` or ``bias``.

    Raises:
        LookupError: The layer keeps one of them nowhere, so that it cannot be replaced.
    """
    everywhere = layer._parameters, layer._buffers, vars(layer)
    places: dict[str, dict[str, Any]] = {}
    for name in tensors:
        found = [place for place in everywhere if name in place]
        if not found:
            raise LookupError(f"its {name} is none of its parameters")
        places[name] = found[0]
    before = {name: place[name] for name, place in places.items()}
    for name, place in places.items():
        place[name] = tensors[name]
    try:
        yield
    finally:
        for name, place in places.items():
            place[name] = before[name]
