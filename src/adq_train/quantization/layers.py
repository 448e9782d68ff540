"""Quantized convolution and linear layers: the float layer with a quantizer on weight and input."""

from __future__ import annotations

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


class QuantLinear(nn.Linear):
    """A Linear whose weight and input are quantized."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, …, in_features) to (N, …, out_features)."""
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


QuantLayer = QuantConv1d | QuantConv2d | QuantConv3d | QuantLinear


QUANTIZED: dict[type[nn.Module], Any] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}


def quantized(
    layer: nn.Module, weight_quantizer: WeightQuantizer, input_quantizer: ActivationQuantizer
) -> QuantLayer:
    """The quantized form of a float layer; it shares the layer's parameters.

    Args:
        layer: Exactly a Conv1d, Conv2d, Conv3d or Linear.
        weight_quantizer: For its weight.
        input_quantizer: For its input.

    Raises:
        TypeError: Another kind of layer.
    """
    new: QuantLayer
    # On the meta device the new layer has no memory of its own: its parameters are replaced.
    if type(layer) is nn.Linear:
        has_bias = layer.bias is not None
        new = QuantLinear(layer.in_features, layer.out_features, has_bias, device="meta")
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and type(layer) in QUANTIZED:
        new = QUANTIZED[type(layer)](
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
    else:
        raise TypeError(f"cannot quantize a {type(layer).__name__}")
    new.weight, new.bias = layer.weight, layer.bias
    new.weight_quantizer, new.input_quantizer = weight_quantizer, input_quantizer
    new.train(layer.training)
    return new
