"""Quantized convolution and linear layers: the float layer with a quantizer on weight and input."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from adq_train.quantization.base import ActivationQuantizer, Quantizer, WeightQuantizer
from adq_train.quantization.layer_weights import computing_with, weight_identity

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# A bfloat16 has 8 significant bits: evenly spaced levels of 7 bits stay apart, of 8 bits do not.
APART_IN_BFLOAT16 = 7


class QuantLayer(nn.Module):
    """What all quantized layers are: a float layer with a quantizer on weight and input."""

    weight: Tensor
    bias: Any  # a Tensor, or None; base classes say it differently
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def __repr__(self) -> str:
        """One line, where a layer has nothing within but its quantizers."""
        if set(self._modules) != {"weight_quantizer", "input_quantizer"}:
            return str(super().__repr__())
        of = f"weight={self.weight_quantizer}, input={self.input_quantizer}"
        return f"{type(self).__name__}({self.extra_repr()}, {of})"


def _between_quantized(layer: QuantLayer, operation: Operation, x: Tensor) -> Tensor:
    """The float layer's own operation, with its input and its weight quantized.

    A layer of another type than float32 computes in float32, where its levels keep all their bits;
    so does one of 8 bits within autocast, which gives its output in autocast's type all the same.
    """
    kind = x.device.type
    quantizers = layer.input_quantizer, layer.weight_quantizer
    many = any(q.bit_width > APART_IN_BFLOAT16 for q in quantizers if isinstance(q, Quantizer))
    if many and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _in_its_own_type(layer, operation, x.float()).to(torch.get_autocast_dtype(kind))
    return _in_its_own_type(layer, operation, x)


def _in_its_own_type(layer: QuantLayer, operation: Operation, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias  # once: some weights are made anew when asked for
    dtype = weight.dtype
    if dtype == torch.float32:
        return operation(layer.input_quantizer(x), layer.weight_quantizer(weight), bias)
    x, weight = layer.input_quantizer(x.float()), layer.weight_quantizer(weight.float())
    return operation(x, weight, None if bias is None else bias.float()).to(dtype)


def transposed(
    layer: nn.ConvTranspose2d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: list[int] | None,
) -> Tensor:
    """A transposed convolution in a layer's geometry: (N, C_in, H, W) to (N, C_out, H', W')."""
    geometry: Any = (layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation)
    padding = layer._output_padding(x, output_size, *geometry)
    at: Any = (layer.stride, layer.padding, padding, layer.groups, layer.dilation)
    return F.conv_transpose2d(x, weight, bias, *at)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """A Conv1d whose weight and input are quantized."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C_in, L) to (N, C_out, L_out)."""
        return _between_quantized(self, self._conv_forward, input)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A Conv2d whose weight and input are quantized."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        return _between_quantized(self, self._conv_forward, input)


class QuantConv3d(QuantLayer, nn.Conv3d):
    """A Conv3d whose weight and input are quantized."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C_in, D, H, W) to (N, C_out, D_out, H_out, W_out)."""
        return _between_quantized(self, self._conv_forward, input)


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """A ConvTranspose2d whose weight and input are quantized.

    Its weight is (C_in, C_out / groups, kH, kW), so a quantizer with one scale for each row of
    the weight has one for each input channel here.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C_out, H_out, W_out)."""

        def operation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return transposed(self, x, weight, bias, output_size)

        return _between_quantized(self, operation, input)


class QuantLinear(QuantLayer, nn.Linear):
    """A Linear whose weight and input are quantized."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, …, in_features) to (N, …, out_features)."""
        return _between_quantized(self, F.linear, input)


class QuantSubclass(QuantLayer):
    """A subclass of one of these layers, in which its own ``forward()`` meets quantized tensors.

    What it computes of its weight, as weight standardisation does, it computes of the quantized
    one. Whether that has any effect, :func:`~.subclasses.refusal` finds out.
    """

    def forward(self, input: Tensor, *others: Any, **named: Any) -> Tensor:
        """Maps what the subclass maps."""
        forward = super().forward

        def operation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
            with computing_with(self, tensors):
                output: Tensor = forward(x, *others, **named)
                return output

        return _between_quantized(self, operation, input)


class QuantEmbedding(QuantLayer, nn.Embedding):
    """An Embedding whose weight is quantized; its input is indices, which stay as they are."""

    bias = None

    def forward(self, input: Tensor) -> Tensor:
        """Maps indices (…) to rows of the weight (…, embedding_dim)."""
        weight, dtype = self.weight_quantizer(self.weight.float()), self.weight.dtype
        frequent = self.scale_grad_by_freq
        rows = F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=frequent)
        return rows.to(dtype)


class Indices(ActivationQuantizer):
    """Stands where an input is indices: nothing is quantized, and there is one level.

    Args:
        bit_width: That the allocation has for it.
    """

    level: Tensor

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.register_buffer("level", torch.zeros(1))  # a state tells by it what was quantized

    def calibrate(self, values: Tensor, seed: int = 0) -> None:
        """Nothing to do, and indices are not looked at."""

    def forward(self, x: Tensor) -> Tensor:
        """The indices."""
        return x

    def quantize(self, x: Tensor) -> Tensor:
        """The one code."""
        return torch.zeros_like(x, dtype=torch.uint8)

    def levels(self) -> Tensor:
        """One, that stands for nothing, (1,)."""
        return self.level


# Exact types; subclasses become a :class:`QuantSubclass` each.
QUANTIZED: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
}


@functools.cache
def _form_of(kind: type[nn.Module]) -> type[QuantSubclass]:
    """The class of a subclass's quantized layers."""
    return type(f"Quant{kind.__name__}", (QuantSubclass, kind), {"__module__": kind.__module__})


def quantized_kind(layer: nn.Module) -> type[QuantLayer] | None:
    """The class that a float layer becomes, or None where it cannot be quantized.

    An embedding can be, unless it has ``max_norm`` or ``sparse``. A parametrized layer counts as
    what it was before; one whose ``forward`` was replaced does not, nor does a parametrized
    subclass.
    """
    if "forward" in vars(layer) or isinstance(layer, QuantLayer):
        return None
    kind = QUANTIZED.get(type_before_parametrizations(layer))
    if type_before_parametrizations(layer) is nn.Embedding:
        # Others change their weight in forward(), or want gradients of their own form.
        plain = layer.max_norm is None and not layer.sparse
        return QuantEmbedding if plain else None
    if kind is None and isinstance(layer, tuple(QUANTIZED)) and not is_parametrized(layer):
        return _form_of(type(layer))  # type: ignore[arg-type]
    return kind


def quantized(
    layer: nn.Module, weight_quantizer: WeightQuantizer, input_quantizer: ActivationQuantizer
) -> QuantLayer:
    """The quantized form of a float layer; it shares the layer's parameters.

    Args:
        layer: One of the types in :data:`QUANTIZED`, parametrized or not, or a subclass.
        weight_quantizer: For its weight.
        input_quantizer: For its input.

    Raises:
        TypeError: Another kind of layer.
    """
    kind = quantized_kind(layer)
    if kind is None:
        raise TypeError(f"cannot quantize a {type(layer).__name__}")
    if is_parametrized(layer):
        # The class of a parametrized layer has a property for each tensor that is made anew.
        of_type = {k: v for k, v in vars(type(layer)).items() if k not in vars(kind)}
        kind = type(f"Parametrized{kind.__name__}", (kind,), of_type)
    # The same layer under another class: parameters and hooks are shared, their registers not.
    new: QuantLayer = kind.__new__(kind)
    new.__dict__.update({name: copy.copy(value) for name, value in vars(layer).items()})
    new.weight_quantizer, new.input_quantizer = weight_quantizer, input_quantizer
    return new


def is_subclass(layer: nn.Module) -> bool:
    """Whether a layer, float or quantized, computes with a ``forward()`` of its own."""
    form = quantized_kind(layer)
    return isinstance(layer, QuantSubclass) or bool(form and issubclass(form, QuantSubclass))


def float_kind(layer: nn.Module) -> type[nn.Module]:
    """The class that a quantized layer has without its quantizers; its own for any other."""
    kinds = type(layer).__mro__
    return kinds[kinds.index(QuantLayer) + 1] if isinstance(layer, QuantLayer) else kinds[0]


def float_form(layer: nn.Module) -> nn.Module:
    """A quantized subclass of a layer without its quantizers; it shares the layer's parameters."""
    kind = float_kind(layer)
    new: nn.Module = kind.__new__(kind)
    new.__dict__.update({name: copy.copy(value) for name, value in vars(layer).items()})
    for name in ("weight_quantizer", "input_quantizer"):
        new._modules.pop(name, None)
    return new


def same_weight(model: nn.Module, name: str) -> list[str]:
    """The layers that use the weight of the layer ``name``, itself first, one name for each."""
    weight = weight_identity(model.get_submodule(name))
    others = [
        other
        for other, module in model.named_modules()
        if quantized_kind(module) and weight_identity(module) is weight and other != name
    ]
    return [name, *others]
