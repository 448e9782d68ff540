"""Surgery: float layers become quantized layers, and their quantizers are initialised from data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from adq_train.artifacts import BitAllocation, LayerBits
from adq_train.data.base import derived_seed
from adq_train.errors import UserError
from adq_train.quantization.base import (
    MakeActivationQuantizer,
    MakeWeightQuantizer,
    WeightQuantizer,
    is_pruned,
)
from adq_train.quantization.copies import unfuse
from adq_train.quantization.layer_weights import (
    made_by_hooks,
    used_weight,
    with_kept_weight,
)
from adq_train.quantization.layers import (
    Indices,
    QuantLayer,
    quantized,
    quantized_kind,
    same_weight,
)
from adq_train.quantization.watch import run_with_hooks

log = logging.getLogger(__name__)


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
        model: The float network; it calls every layer afterwards, see :func:`~.copies.unfuse`.
        names: The layers' qualified names; those that share a weight with them are added.
        batches: Images (N, C, H, W), normalised.
        seed: Which values are drawn.
        values_per_batch: At most this many values of each layer and batch.

    Returns:
        One flat float32 tensor for each layer that is called.
    """
    unfuse(model)
    every = (x for name in names for x in same_weight(model, name))
    samples: dict[str, list[Tensor]] = {name: [] for name in every}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        samples[name].append(sampled(inputs[0], seed, name, len(samples[name]), values_per_batch))

    hooks = {name: partial(record, name) for name in samples}
    for images in batches:
        run_with_hooks(model, images, hooks)
    # A layer may have a weight in common with another, and never be called itself.
    return {name: torch.cat(parts) for name, parts in samples.items() if parts}


def sampled(x: Tensor, seed: int, name: str, batch: int, most: int = 2**15) -> Tensor:
    """Some of the values of a tensor, drawn with replacement, or all of them where they are few.

    Args:
        x: Any shape.
        seed: Of the run.
        name: Of the place that the tensor is from.
        batch: Number of the batch.
        most: At most so many values.

    Returns:
        One dimension, float32.
    """
    values = x.detach().float().flatten()
    if len(values) <= most:
        return values
    generator = torch.Generator().manual_seed(derived_seed(seed, name, batch))
    chosen = torch.randint(len(values), (most,), generator=generator)
    return values[chosen.to(values.device)]


def quantize_layer(
    model: nn.Module,
    bits: LayerBits,
    make_weight_quantizer: MakeWeightQuantizer,
    make_activation_quantizer: MakeActivationQuantizer,
    inputs: Mapping[str, Tensor],
    seed: int,
) -> dict[str, QuantLayer]:
    """The quantized form of a layer, and of those called that share its weight, from data.

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
    weight = used_weight(model.get_submodule(bits.name))
    weight_quantizer = make_weight_quantizer(bits.weight_bits).to(weight.device)
    forms = {}
    try:
        weight_quantizer.calibrate(weight.detach(), derived_seed(seed, bits.name))
        for name in (x for x in same_weight(model, bits.name) if x in inputs):
            layer = model.get_submodule(name)
            make = Indices if isinstance(layer, nn.Embedding) else make_activation_quantizer
            input_quantizer = make(bits.activation_bits).to(weight.device)
            input_quantizer.calibrate(inputs[name])
            forms[name] = quantized(layer, weight_quantizer, input_quantizer)
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
        say_what_becomes_of_zeros(bits.name, forms[bits.name])


@torch.no_grad()
def say_what_becomes_of_zeros(name: str, layer: QuantLayer) -> None:
    """Logs whether a layer that was pruned stays so."""
    weight = used_weight(layer)
    zeros = weight == 0
    if is_pruned(weight):
        share = f"{100 * float(zeros.float().mean()):.0f} % of its weights are exactly zero"
        if layer.weight_quantizer(weight)[zeros].any():
            log.warning(
                "%s: %s and do not stay so: its quantizer has no level at zero; choose one that "
                "has", name, share,
            )  # fmt: skip
        else:
            log.info("%s: %s and have a level of their own", name, share)


def swap(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Puts ``layers`` wherever the modules of these names stand, and returns those.

    A module that stands in more than one place is replaced in all of them. What would compute
    past the new ones is switched off, see :func:`~.copies.unfuse`.
    """
    unfuse(model)
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


def keep_weights(model: nn.Module) -> None:
    """Makes parameters of the weights that are made anew in every forward pass, in place.

    Args:
        model: Float or quantized; it computes the same afterwards, and no longer trains the same.
    """
    layers = {
        name: with_kept_weight(module)
        for name, module in model.named_modules()
        if (isinstance(module, QuantLayer) or quantized_kind(module))
        and (is_parametrized(module) or made_by_hooks(module))
    }
    swap(model, layers)


class Upkeep:
    """What the quantizers of a prepared network ask for around each optimizer step.

    Args:
        model: Its quantizers and layers are looked up once, here.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: dict[type[WeightQuantizer], dict[WeightQuantizer, QuantLayer]] = {}
        for quantizer, layer in weight_quantizers(model).items():
            self._weights.setdefault(type(quantizer), {})[quantizer] = layer
        self._inputs = [layer.input_quantizer for layer in quantized_layers(model).values()]

    def before_step(self) -> None:
        """Lets quantizers of inputs add to the gradients."""
        for input_quantizer in self._inputs:
            input_quantizer.regularize()

    @torch.no_grad()
    def after_step(self) -> None:
        """Lets codebooks follow the weights."""
        for kind, layers in self._weights.items():
            kind.adapt_all(list(layers), [used_weight(layer) for layer in layers.values()])


def weight_quantizers(model: nn.Module) -> dict[WeightQuantizer, QuantLayer]:
    """The weight quantizers of a prepared network, each with one of the layers that share it."""
    found: dict[WeightQuantizer, QuantLayer] = {}
    for layer in quantized_layers(model).values():
        found.setdefault(layer.weight_quantizer, layer)
    return found


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a prepared network by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
