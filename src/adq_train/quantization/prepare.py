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
from adq_train.quantization.base import (
    MakeActivationQuantizer,
    MakeWeightQuantizer,
    WeightQuantizer,
)
from adq_train.quantization.describe import run_with_hooks, same_weight
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
        names: The layers' qualified names; those that share a weight with them are added.
        batches: Images (N, C, H, W), normalised.
        seed: Which values are drawn.
        values_per_batch: At most this many values of each layer and batch.

    Returns:
        One flat float32 tensor per layer.
    """
    every = (x for name in names for x in same_weight(model, name))
    samples: dict[str, list[Tensor]] = {name: [] for name in every}

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
    model: nn.Module,
    bits: LayerBits,
    make_weight_quantizer: MakeWeightQuantizer,
    make_activation_quantizer: MakeActivationQuantizer,
    inputs: Mapping[str, Tensor],
    seed: int,
) -> dict[str, QuantLayer]:
    """The quantized form of a layer, and of those that share its weight, initialised from data.

    Args:
        model: The float network; the result shares its parameters.
        bits: The layer's name and bit-widths.
        make_weight_quantizer: Maps a bit-width to a quantizer; a shared weight has one codebook.
        make_activation_quantizer: Maps a bit-width to a quantizer; each layer has its own.
        inputs: A sample of each layer's inputs, any shape.
        seed: For random initialisations.

    Returns:
        Quantized layers by name; a single one where the weight is not shared.

    Raises:
        UserError: Weights or inputs are NaN or infinite; the layer is named.
    """
    weight = model.get_submodule(bits.name).weight
    assert isinstance(weight, Tensor)
    weight_quantizer = make_weight_quantizer(bits.weight_bits).to(weight.device)
    forms = {}
    try:
        weight_quantizer.calibrate(weight.detach(), derived_seed(seed, bits.name))
        for name in same_weight(model, bits.name):
            input_quantizer = make_activation_quantizer(bits.activation_bits).to(weight.device)
            input_quantizer.calibrate(inputs[name])
            forms[name] = quantized(model.get_submodule(name), weight_quantizer, input_quantizer)
    except ValueError as error:
        raise UserError(f"layer {bits.name}: {error}; check the float model") from error
    return forms


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
    names = {name for name, _ in model.named_modules()}
    for bits in allocation.layers:
        if bits.name not in names:
            raise UserError(f"allocation: the model has no layer {bits.name!r}")
        forms = quantize_layer(
            model, bits, make_weight_quantizer, make_activation_quantizer, inputs, seed
        )
        swap(model, forms)


def swap(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Puts ``layers`` wherever the modules of these names stand, and returns those.

    A module that stands in more than one place is replaced in all of them.
    """
    before = {name: model.get_submodule(name) for name in layers}
    after = {id(old): layers[name] for name, old in before.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in after:
            model.set_submodule(name, after[id(module)])
    return before


@contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts ``layers`` in the places of the modules of these names during a with block."""
    before = swap(model, layers)
    try:
        yield
    finally:
        swap(model, before)


class Upkeep:
    """What the quantizers of a prepared network ask for around each optimizer step.

    Args:
        model: Its quantizers and weights are looked up once, here.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = quantized_weights(model)
        self._inputs = [layer.input_quantizer for layer in quantized_layers(model).values()]

    def before_step(self) -> None:
        """Lets quantizers add to the gradients."""
        for quantizer, weight in self._weights:
            quantizer.regularize(weight)
        for input_quantizer in self._inputs:
            input_quantizer.regularize()

    def after_step(self, step: int) -> None:
        """Lets codebooks follow the weights after optimizer step number ``step``, from 1."""
        for quantizer, weight in self._weights:
            quantizer.adapt(weight, step)


def quantized_weights(model: nn.Module) -> list[tuple[WeightQuantizer, Tensor]]:
    """Every weight quantizer of a prepared network with its weight; a shared one once."""
    layers = quantized_layers(model).values()
    return list({layer.weight_quantizer: layer.weight for layer in layers}.items())


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a prepared network by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
