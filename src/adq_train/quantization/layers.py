"""Quantized convolution and linear layers: the float layer with a quantizer on weight and input."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.quantization.base import ActivationQuantizer, WeightQuantizer


def _convolve(layer: QuantConv1d | QuantConv2d | QuantConv3d, x: Tensor) -> Tensor:
    """The float layer's own convolution, between quantized tensors."""
    weight = layer.weight_quantizer(layer.weight)
    output: Tensor = layer._conv_forward(layer.input_quantizer(x), weight, layer.bias)
    return output


class QuantConv1d(nn.Conv1d):
    """A Conv1d whose weight and input are quantized."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C_in, L) to (N, C_out, L_out)."""
        return _convolve(self, input)


class QuantConv2d(nn.Conv2d):
    """A Conv2d whose weight and input are quantized."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        return _convolve(self, input)


class QuantConv3d(nn.Conv3d):
    """A Conv3d whose weight and input are quantized."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C_in, D, H, W) to (N, C_out, D_out, H_out, W_out)."""
        return _convolve(self, input)


class QuantConvTranspose2d(nn.ConvTranspose2d):
    """A ConvTranspose2d whose weight and input are quantized.

    Its weight is (C_in, C_out / groups, kH, kW), so a quantizer with one scale for each row of
    the weight has one for each input channel here.
    """

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        geometry: Any = (self.stride, self.padding, self.kernel_size, 2, self.dilation)
        return F.conv_transpose2d(
            self.input_quantizer(input),
            self.weight_quantizer(self.weight),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            self._output_padding(input, output_size, *geometry),
            self.groups,
            self.dilation,
        )


class QuantLinear(nn.Linear):
    """A Linear whose weight and input are quantized."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, …, in_features) to (N, …, out_features)."""
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


QuantLayer = QuantConv1d | QuantConv2d | QuantConv3d | QuantConvTranspose2d | QuantLinear

# Exact types: a subclass may be called in ways that a quantized layer would not see, as
# nn.MultiheadAttention does with the weights of its projections.
QUANTIZED: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
}


def quantized(
    layer: nn.Module, weight_quantizer: WeightQuantizer, input_quantizer: ActivationQuantizer
) -> QuantLayer:
    """The quantized form of a float layer; it shares the layer's parameters.

    Args:
        layer: Exactly one of the types in :data:`QUANTIZED`.
        weight_quantizer: For its weight.
        input_quantizer: For its input.

    Raises:
        TypeError: Another kind of layer.
    """
    kind = QUANTIZED.get(type(layer))
    if kind is None:
        raise TypeError(f"cannot quantize a {type(layer).__name__}")
    # The same layer under another class: parameters and hooks are shared, their registers not.
    new = kind.__new__(kind)
    new.__dict__.update({name: copy.copy(value) for name, value in vars(layer).items()})
    new.weight_quantizer, new.input_quantizer = weight_quantizer, input_quantizer
    return new
