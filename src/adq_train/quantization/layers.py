"""Quantized convolution and linear layers: the float layer with a quantizer on weight and input."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.quantization.base import ActivationQuantizer, WeightQuantizer

Conv = TypeVar("Conv", nn.Conv1d, nn.Conv2d, nn.Conv3d)


class QuantConv1d(nn.Conv1d):
    """A Conv1d whose weight and input are quantized."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C_in, L) to (N, C_out, L_out)."""
        weight = self.weight_quantizer(self.weight)
        return self._conv_forward(self.input_quantizer(input), weight, self.bias)


class QuantConv2d(nn.Conv2d):
    """A Conv2d whose weight and input are quantized."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        weight = self.weight_quantizer(self.weight)
        return self._conv_forward(self.input_quantizer(input), weight, self.bias)


class QuantConv3d(nn.Conv3d):
    """A Conv3d whose weight and input are quantized."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C_in, D, H, W) to (N, C_out, D_out, H_out, W_out)."""
        weight = self.weight_quantizer(self.weight)
        return self._conv_forward(self.input_quantizer(input), weight, self.bias)


class QuantLinear(nn.Linear):
    """A Linear whose weight and input are quantized."""

    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, …, in_features) to (N, …, out_features)."""
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


QuantLayer = QuantConv1d | QuantConv2d | QuantConv3d | QuantLinear


def _like_conv(kind: type[Conv], layer: Conv) -> Conv:
    """A convolution of another class with the settings of ``layer`` and no memory of its own."""
    return kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
        device="meta",
    )


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
    if type(layer) is nn.Conv2d:
        new = _like_conv(QuantConv2d, layer)
    elif type(layer) is nn.Conv1d:
        new = _like_conv(QuantConv1d, layer)
    elif type(layer) is nn.Conv3d:
        new = _like_conv(QuantConv3d, layer)
    elif type(layer) is nn.Linear:
        has_bias = layer.bias is not None
        new = QuantLinear(layer.in_features, layer.out_features, has_bias, device="meta")
    else:
        raise TypeError(f"cannot quantize a {type(layer).__name__}")
    new.weight, new.bias = layer.weight, layer.bias
    new.weight_quantizer, new.input_quantizer = weight_quantizer, input_quantizer
    new.train(layer.training)
    return new
