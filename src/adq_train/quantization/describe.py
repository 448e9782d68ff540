"""Finds the layers of a network that can be quantized, and counts what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError
from adq_train.nested import tensors
from adq_train.quantization.copies import own_copy
from adq_train.quantization.full_precision import (
    WARNED,
    Strictness,
    in_full_precision,
    tell,
    used_elsewhere,
)
from adq_train.quantization.layer_weights import (
    evaluating,
    used_weight,
    weight_identity,
    weight_sources,
)
from adq_train.quantization.layers import QuantSubclass, float_form, quantized, quantized_kind
from adq_train.quantization.prepare import swap
from adq_train.quantization.subclasses import refusal
from adq_train.quantization.watch import Call, Reads, first_input, intercepted


def count_macs(layer: nn.Module, input: Tensor, output: Tensor) -> int:
    """Multiply-accumulates behind one output (1, …) of a layer; an embedding has none."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Embedding):
        return 0
    # Each output element is a dot product with one filter: (C_out, …) has numel / C_out entries.
    # In a transposed convolution it is each input element that meets a filter, (C_in, …).
    elements = input if isinstance(layer, nn.ConvTranspose2d) else output
    return elements.numel() * weight.numel() // weight.shape[0]


@torch.no_grad()
def describe_layers(
    model: nn.Module,
    image: Any,
    num_classes: int | None = None,
    count: int | None = None,
    strictness: Strictness = WARNED,
) -> tuple[LayerInfo, ...]:
    """Runs one image and lists the quantizable layers in the order of their execution.

    Surgery is tried on a copy, whose layers get quantizers that change nothing: what is then not
    computed by them stays in full precision, and a warning names it.

    Args:
        model: A float network; left as it was.
        image: (1, C, H, W); or what else the network takes, see :mod:`~.task`.
        num_classes: That the data has; None where any number of outputs will do.
        count: Examples in the image, over which what is counted is divided; None: a tensor of one,
            whose outputs must be logits.
        strictness: Which matrices of weights may stay in full precision.

    Raises:
        UserError: The network has no such layer, or is one itself; it does not map the image to
            logits, one for each class; it holds a layer where it cannot be replaced; or what must
            not stay in full precision does.
    """
    require_replaceable(model)
    trial = own_copy(model)
    names = [name for name, module in trial.named_modules() if quantized_kind(module)]
    layers: dict[str, nn.Module] = {
        name: quantized(trial.get_submodule(name), nn.Identity(), nn.Identity())  # type: ignore[arg-type]
        for name in names
    }
    own = {name: float_form(x) for name, x in layers.items() if isinstance(x, QuantSubclass)}
    before = swap(trial, layers)
    found: dict[str, LayerInfo] = {}
    name_of: dict[object, str] = {}
    refused: dict[str, str | None] = {}
    aliases: dict[str, None] = {}
    reads = Reads(trial)
    for name, layer in layers.items():
        reads.owned(name, weight_sources(layer))

    def record(name: str, forward: Call, *inputs: Any, **named: Any) -> Any:
        layer = layers[name]
        with reads.inside():
            x = first_input(inputs, named)
            if name in own and name not in refused:
                refused[name] = refusal(own[name], x, inputs[1:], named)
            if refused.get(name):
                return own[name].forward(*inputs, **named)
            output, num_weights = forward(*inputs, **named), used_weight(layer).numel()
            macs = count_macs(layer, x, output)
        # A weight that is used more than once, by one layer or by several, counts once.
        name = name_of.setdefault(weight_identity(layer), name)
        reads.owned(name, weight_sources(layer))
        old = found.get(name, LayerInfo(name, 0, 0, 0))
        if not old.macs:  # a weight of an embedding takes its place where it first computes
            found.pop(name, None)
        found[name] = LayerInfo(name, num_weights, old.macs + macs, old.num_inputs + x.numel())
        return output

    def elsewhere(name: str, forward: Call, *inputs: Any, **named: Any) -> Any:
        aliases[name] = None
        return forward(*inputs, **named)

    with evaluating(trial), intercepted(layers, record), intercepted(before, elsewhere), reads:
        output = run(trial, image)
    if count is None:
        check_logits(output, len(image), num_classes)
    require_reachable(aliases, reads)
    reasons = {name: why for name, why in refused.items() if why}
    for name in reasons:  # nor can another layer be quantized that uses its weight
        if other := name_of.pop(weight_identity(layers[name]), None):
            del found[other]
    if not found:
        raise UserError(
            f"model: none of its {len(layers)} convolution and linear layers is called; a forward "
            "of your own must call the network that it is given"
            if layers
            else "model: it has no convolution or linear layer that could be quantized"
        )
    past = [weight_identity(layers[name]) for name in reads.past]
    left = [
        *in_full_precision(trial, name_of, reasons),
        *used_elsewhere(trial, {name_of[x]: x for x in past if x in name_of}),
    ]
    tell(left, strictness)
    return tuple(per_example(x, count or 1) for x in found.values())


def run(trial: nn.Module, image: Any) -> object:
    """What a network makes of an input.

    Raises:
        UserError: Its ``forward()`` fails.
    """
    try:
        return trial(image)
    except UserError:
        raise
    except Exception as error:  # its forward() may fail in any way
        raise UserError(
            f"model: its forward() fails on {described_input(image)} "
            f"({type(error).__name__}: {error}); it must take one tensor (N, …)"
        ) from error


def per_example(total: LayerInfo, count: int) -> LayerInfo:
    """What a layer costs for one of ``count`` examples, rounded up."""
    return replace(total, macs=-(-total.macs // count), num_inputs=-(-total.num_inputs // count))


def described_input(value: Any) -> str:
    """The shapes and types of what goes in, for messages."""
    return ", ".join(
        f"an input of shape {tuple(x.shape)} and type {x.dtype}" for _, x in tensors(value)
    )


def require_replaceable(model: nn.Module) -> None:
    """Refuses a network whose layers cannot be replaced.

    Raises:
        UserError: It is a single layer or a ScriptModule, or has weights that are not made yet.
    """
    if quantized_kind(model):
        raise UserError(
            "model: it is a single layer, which cannot be replaced; wrap it in a module"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            "model: the layers of a ScriptModule cannot be replaced; give the module that it was "
            "made from"
        )
    lazy = [name for name, m in model.named_modules() if isinstance(m, LazyModuleMixin)]
    if lazy:
        raise UserError(
            f"model: {lazy[0]} has no weights yet; run the network once, and train it first"
        )


def require_reachable(aliases: Iterable[str], reads: Reads) -> None:
    """Refuses a network that calls layers, or uses weights, past its own modules.

    Args:
        aliases: Layers that were called elsewhere.
        reads: What the network has read.

    Raises:
        UserError: Names one of them.
    """
    for name in aliases:
        raise UserError(
            f"model: the layer {name} is also called from a place where it cannot "
            "be replaced, such as a plain list, a dict or an object that is no module; call it "
            "by its name, or hold it in an nn.ModuleList or nn.ModuleDict"
        )
    if reads.unregistered:
        shape = tuple(reads.unregistered[0].shape)
        raise UserError(
            f"model: its forward() uses a weight of shape {shape} that is not among its "
            "parameters(); hold modules in an nn.ModuleList or nn.ModuleDict, not in a plain list, "
            "dict or function, and let a forward of your own call the network that it is given"
        )


def check_logits(output: object, count: int, num_classes: int | None = None) -> None:
    """Refuses outputs of a network that are not the logits of ``count`` inputs.

    Args:
        output: Of the network.
        count: How many inputs there were.
        num_classes: That the data has, where that is known.

    Raises:
        UserError: Says what they are, and how to hand over the logits alone.
    """
    if not isinstance(output, Tensor):
        raise UserError(
            f"model: its output is a {type(output).__name__}, not a tensor of logits; wrap it in a "
            "module whose forward() returns the logits alone"
        )
    if not output.dim() or len(output) != count or not output.is_floating_point():
        raise UserError(
            f"model: its output for {count} input(s) has shape {tuple(output.shape)} and type "
            f"{output.dtype}, not logits (N, …); wrap it in a module that returns those"
        )
    if num_classes is not None and output.shape != (count, num_classes):
        raise UserError(
            f"model: its output for {count} input(s) has shape {tuple(output.shape)}, but the data "
            f"has {num_classes} classes; let its constructor take num_classes, or give its setting"
        )
