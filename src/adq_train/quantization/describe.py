"""Finds the layers of a network that can be quantized, and counts what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


class Survey:
    """What one run of a network tells of its quantized layers, whose quantizers change nothing.

    Args:
        trial: The network.
        layers: Its quantized layers, by name.

    Attributes:
        found: What is counted of each weight, under the name of the first layer that uses it.
        name_of: That name, by the weight's identity.
        refused: Why a subclass with a ``forward()`` of its own stays as it is, by name; None where
            it need not.
        aliases: Names under which a layer is called past its quantized form.
        reads: Who reads which weight.
    """

    def __init__(self, trial: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.own = {
            name: float_form(x) for name, x in layers.items() if isinstance(x, QuantSubclass)
        }
        self.found: dict[str, LayerInfo] = {}
        self.name_of: dict[object, str] = {}
        self.refused: dict[str, str | None] = {}
        self.aliases: dict[str, None] = {}
        self.reads = Reads(trial)
        for name, layer in layers.items():
            self.reads.owned(name, weight_sources(layer))

    def layer(self, name: str, forward: Call, *inputs: Any, **named: Any) -> Any:
        """A call of a quantized layer."""
        layer = self.layers[name]
        with self.reads.inside():
            x = first_input(inputs, named)
            if name in self.own and name not in self.refused:
                self.refused[name] = refusal(self.own[name], x, inputs[1:], named)
            if self.refused.get(name):
                return self.own[name].forward(*inputs, **named)
            output, num_weights = forward(*inputs, **named), used_weight(layer).numel()
            macs = count_macs(layer, x, output)
        # A weight that is used more than once, by one layer or by several, counts once.
        name = self.name_of.setdefault(weight_identity(layer), name)
        self.reads.owned(name, weight_sources(layer))
        old = self.found.get(name, LayerInfo(name, 0, 0, 0))
        if not old.macs:  # a weight of an embedding takes its place where it first computes
            self.found.pop(name, None)
        inputs_so_far = old.num_inputs + x.numel()
        self.found[name] = LayerInfo(name, num_weights, old.macs + macs, inputs_so_far)
        return output

    def elsewhere(self, name: str, forward: Call, *inputs: Any, **named: Any) -> Any:
        """A call of a layer that should have been replaced."""
        self.aliases[name] = None
        return forward(*inputs, **named)

    def reasons(self) -> dict[str, str]:
        """Why layers stay in full precision; nor can one be quantized that uses such a weight."""
        reasons = {name: why for name, why in self.refused.items() if why}
        for name in reasons:
            if other := self.name_of.pop(weight_identity(self.layers[name]), None):
                del self.found[other]
        return reasons

    def read_past(self) -> dict[str, object]:
        """The weights that something else reads too, by layer."""
        past = [weight_identity(self.layers[name]) for name in self.reads.past]
        return {self.name_of[x]: x for x in past if x in self.name_of}


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
    survey, before = Survey(trial, layers), swap(trial, layers)
    with (
        evaluating(trial),
        intercepted(layers, survey.layer),
        intercepted(before, survey.elsewhere),
        survey.reads,
    ):
        output = run(trial, image)
    if count is None:
        check_logits(output, len(image), num_classes)
    require_reachable(survey.aliases, survey.reads)
    reasons = survey.reasons()
    if not survey.found:
        raise UserError(
            f"model: none of its {len(layers)} convolution and linear layers is called; a forward "
            "of your own must call the network that it is given"
            if layers
            else "model: it has no convolution or linear layer that could be quantized"
        )
    left = [
        *in_full_precision(trial, survey.name_of, reasons),
        *used_elsewhere(trial, survey.read_past()),
    ]
    tell(left, strictness)
    return tuple(per_example(x, count or 1) for x in survey.found.values())


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
            f"({type(error).__name__}: {error}); it must take that one tensor; "
            "a constructor that names in_channels or num_classes gets those of the data"
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
            f"{output.dtype}, not logits (N, …); wrap it in a module that returns "
            "those (squeeze() takes the first axis of one input away, squeeze(-1) does not)"
        )
    if num_classes is not None and output.shape != (count, num_classes):
        raise UserError(
            f"model: its output for {count} input(s) has shape {tuple(output.shape)}, but the data "
            f"has {num_classes} classes; let its constructor take num_classes"
        )
