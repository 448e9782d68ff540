"""Watches a forward pass without changing it: which layers are called, and which weights are read.

PyTorch's own hooks change what is computed: its fused paths are taken only where there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adq_train.quantization.layer_weights import evaluating

Call = Callable[..., Any]


@contextmanager
def intercepted(layers: Mapping[str, nn.Module], around: Callable[..., Any]) -> Iterator[None]:
    """Lets ``around(name, forward, *inputs)`` stand for the forward() of some layers.

    Args:
        layers: By name.
        around: Makes the call, and returns its result.
    """
    replaced = {layer: vars(layer).get("forward") for layer in layers.values()}
    for name, layer in layers.items():
        vars(layer)["forward"] = partial(around, name, layer.forward)
    try:
        yield
    finally:
        for layer, own in replaced.items():
            del vars(layer)["forward"]
            if own is not None:
                vars(layer)["forward"] = own


def run_with_hooks(
    model: nn.Module, images: Tensor, hooks: Mapping[str, Callable[..., None]]
) -> Tensor:
    """Runs ``images`` in evaluation mode, and calls hooks after some modules; undoes both.

    Args:
        model: It computes just what it computes without hooks.
        images: (N, C, H, W).
        hooks: By the modules' names; each gets a module, its inputs as a tuple, and its output.
    """
    modules = dict(model.named_modules())

    def call(name: str, forward: Call, *inputs: Any, **named: Any) -> Any:
        output = forward(*inputs, **named)
        hooks[name](modules[name], (first_input(inputs, named), *inputs[1:]), output)
        return output

    with evaluating(model), intercepted({name: modules[name] for name in hooks}, call):
        output: Tensor = model(images)
        return output


def first_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a layer works on, given by position or as ``input=``."""
    return inputs[0] if inputs else named["input"]


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which weights are read outside the layers that they belong to.

    Args:
        model: Weights that it has not registered are seen as well.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.past: dict[str, None] = {}
        self.unregistered: list[Tensor] = []
        self._registered = {address(x) for x in model.parameters()}
        self._owners: dict[int | None, str] = {}
        self._kept: list[Tensor] = []
        self._inside = 0

    def owned(self, name: str, tensors: Iterable[Tensor]) -> None:
        """From now on, reading ``tensors`` is the business of the layer ``name``."""
        for tensor in tensors:
            self._owners[address(tensor)] = name
            self._kept.append(tensor)  # so that nothing else gets its place in memory

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What is read during a with block is read by the layer it belongs to."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation of PyTorch."""
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and not self._inside:
                self._see(value)
        return func(*args, **(kwargs or {}))

    def _see(self, value: Tensor) -> None:
        where = address(value)
        if where is None:
            return
        if where in self._owners:
            self.past[self._owners[where]] = None
        is_weight = isinstance(value, nn.Parameter) or (value.is_leaf and value.requires_grad)
        if is_weight and is_matrix(value) and where not in self._registered:
            self.unregistered.append(value)


def address(x: Tensor) -> int | None:
    """Where a tensor's memory begins; views of one tensor have the same, some layouts have none."""
    if x.layout != torch.strided or x.is_nested:
        return None
    return x.untyped_storage().data_ptr() or None


def is_matrix(x: Tensor) -> bool:
    """Whether a tensor is more than a scale or an offset, which have one axis longer than 1."""
    return x.numel() > max(x.shape, default=1)
