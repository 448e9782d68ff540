"""Surgery: float layers become quantized layers, and their quantizers are initialised from data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from adq_train.artifacts import BitAllocation, LayerBits
from adq_train.data.base import derived_seed
from adq_train.errors import UserError
from adq_train.quantization.base import MakeActivationQuantizer, MakeWeightQuantizer
from adq_train.quantization.describe import run_with_hooks
from adq_train.quantization.layers import QuantLayer, quantized


@torch.no_grad()
def collect_inputs(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Tensor],
    seed: int,
    values_per_batch: int = 2**15,
) -> dict[str, Tensor]:
    """Random samples of the inputs that some layers see.

    Args:
        model: The float network.
        names: The layers' qualified names.
        batches: Images (N, C, H, W), normalised.
        seed: Which values are drawn.
        values_per_batch: At most this many values of each layer and batch.

    Returns:
        One flat float32 tensor per layer.
    """
    samples: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        values = inputs[0].detach().float().flatten()
        if len(values) > values_per_batch:
            generator = torch.Generator().manual_seed(derived_seed(seed, name, len(samples[name])))
            chosen = torch.randint(len(values), (values_per_batch,), generator=generator)
            values = values[chosen.to(values.device)]
        samples[name].append(values)

    hooks = {name: partial(record, name) for name in samples}
    for images in batches:
        run_with_hooks(model, images, hooks)
    return {name: torch.cat(parts) for name, parts in samples.items()}


def quantize_layer(
    layer: nn.Module,
    bits: LayerBits,
    make_weight_quantizer: MakeWeightQuantizer,
    make_activation_quantizer: MakeActivationQuantizer,
    inputs: Tensor,
    seed: int,
) -> QuantLayer:
    """The quantized form of one layer, initialised from its weights and a sample of its inputs.

    Args:
        layer: The float layer; the result shares its parameters.
        bits: Its name and bit-widths.
        make_weight_quantizer: Maps a bit-width to a quantizer.
        make_activation_quantizer: Maps a bit-width to a quantizer.
        inputs: A sample of its inputs, any shape.
        seed: For random initialisations.

    Raises:
        UserError: Weights or inputs are NaN or infinite; the layer is named.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight_quantizer = make_weight_quantizer(bits.weight_bits).to(weight.device)
    input_quantizer = make_activation_quantizer(bits.activation_bits).to(weight.device)
    try:
        weight_quantizer.calibrate(weight.detach(), derived_seed(seed, bits.name))
        input_quantizer.calibrate(inputs)
    except ValueError as error:
        raise UserError(f"layer {bits.name}: {error}; check the float model") from error
    return quantized(layer, weight_quantizer, input_quantizer)


def prepare(
    model: nn.Module,
    allocation: BitAllocation,
    make_weight_quantizer: MakeWeightQuantizer,
    make_activation_quantizer: MakeActivationQuantizer,
    inputs: Mapping[str, Tensor],
    seed: int,
) -> None:
    """Replaces every layer of the allocation by its quantized form, in place.

    Args:
        model: The float network.
        allocation: Bits per layer.
        make_weight_quantizer: Maps a bit-width to a quantizer.
        make_activation_quantizer: Maps a bit-width to a quantizer.
        inputs: A sample of each layer's inputs, from :func:`collect_inputs`.
        seed: For random initialisations.

    Raises:
        UserError: The allocation names a layer that the model does not have.
    """
    modules = dict(model.named_modules())
    for bits in allocation.layers:
        if bits.name not in modules:
            raise UserError(f"allocation: the model has no layer {bits.name!r}")
        layer = quantize_layer(
            modules[bits.name],
            bits,
            make_weight_quantizer,
            make_activation_quantizer,
            inputs[bits.name],
            seed,
        )
        _swap(model, modules[bits.name], layer)


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``old`` stands: a shared layer has more than one name."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


@contextmanager
def replaced(model: nn.Module, name: str, layer: nn.Module) -> Iterator[None]:
    """Puts ``layer`` in the place of the module ``name`` for the duration of a with block."""
    original = model.get_submodule(name)
    _swap(model, original, layer)
    try:
        yield
    finally:
        _swap(model, layer, original)


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a prepared network by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
