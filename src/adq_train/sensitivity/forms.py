"""The quantized forms of one layer that metrics try on images, and the row of what they find."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from adq_train.artifacts import LayerBits, LayerInfo, LayerSensitivity
from adq_train.quantization.layers import QuantLayer, quantized
from adq_train.quantization.prepare import quantize_layer
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.noise import Found, by_bits

TENSORS = ("both", "weights", "activations", "separate")

Key = tuple[str, int]  # what is quantized, and at how many bits
Forms = dict[Key, dict[str, nn.Module]]  # of a layer, and of those that share its weight


def parts(tensors: str) -> tuple[str, ...]:
    """What of a layer is quantized, one after the other."""
    return ("weights", "activations") if tensors == "separate" else (tensors,)


def quantized_forms(
    model: nn.Module,
    name: str,
    tensors: str,
    inputs: Mapping[str, Tensor],
    conditions: Conditions,
) -> Forms:
    """A layer, and those that share its weight, quantized in every way that is measured.

    Args:
        model: The float network.
        name: The layer.
        tensors: One of :data:`TENSORS`.
        inputs: A sample of each layer's inputs.
        conditions: Hold the candidates, the quantizers and the seed.
    """
    found: Forms = {}
    for bits in conditions.bit_widths:
        layers = quantize_layer(
            model,
            LayerBits(name, bits, bits),
            conditions.make_weight_quantizer,
            conditions.make_activation_quantizer,
            inputs,
            conditions.seed,
        )
        for part in parts(tensors):
            found[part, bits] = {
                other: only(part, layer, model.get_submodule(other))
                for other, layer in layers.items()
            }
    return found


def only(tensors: str, layer: QuantLayer, original: nn.Module) -> QuantLayer:
    """A quantized layer in evaluation mode, with what is not under test left in float.

    Args:
        tensors: ``weights``, ``activations`` or ``both``.
        layer: The quantized layer.
        original: The float layer.
    """
    weight_quantizer = nn.Identity() if tensors == "activations" else layer.weight_quantizer
    input_quantizer = nn.Identity() if tensors == "weights" else layer.input_quantizer
    return quantized(original, weight_quantizer, input_quantizer).eval()  # type: ignore[arg-type]


def row(info: LayerInfo, tensors: str, found: Mapping[Key, Found]) -> LayerSensitivity:
    """A layer's row of the table.

    Args:
        info: The layer.
        tensors: One of :data:`TENSORS`.
        found: Mean and standard error of every form.
    """
    (first, error), *second = (
        by_bits({bits: value for (what, bits), value in found.items() if what == part})
        for part in parts(tensors)
    )
    apart, apart_error = second[0] if second else (None, None)
    return LayerSensitivity(
        info.name,
        info.num_weights,
        info.macs,
        first,
        apart,
        standard_error=error,
        activation_standard_error=apart_error,
    )
