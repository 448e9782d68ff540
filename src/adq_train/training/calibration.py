"""A quantized copy of a float network, with batch norm's statistics as quantization makes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from adq_train.allocation.patterns import listed
from adq_train.artifacts import BitAllocation
from adq_train.errors import UserError, first_line
from adq_train.quantization.base import Makers
from adq_train.quantization.copies import copied
from adq_train.quantization.layer_weights import evaluating
from adq_train.quantization.layers import Indices, QuantLayer
from adq_train.quantization.prepare import collect_inputs, prepare, quantized_layers
from adq_train.quantization.target import FLOAT, Target
from adq_train.quantization.watch import run_with_hooks
from adq_train.training.batch_norm import batch_norms, reestimate_batch_norm

log = logging.getLogger(__name__)

# Inputs that are so much wider than expected, or so many deviations elsewhere, may all lie beyond
# the outermost thresholds, where no gradient is.
WIDE = 1.5
ASIDE = 0.5
_UNFOLLOWED = "target: the network cannot be followed"
_REMEDY = "reshape batches by torch.flatten(x, 1), or use target=float"


def calibrated(
    model: nn.Module,
    allocation: BitAllocation,
    make: Makers,
    images: Sequence[Tensor],
    seed: int,
    target: Target = FLOAT,
) -> nn.Module:
    """A quantized copy of a float network, initialised from images.

    Args:
        model: The float network; left as it was.
        allocation: The bits of its layers.
        make: Map a bit-width to a quantizer of weights and of inputs.
        images: Batches (N, …); each counts the same in batch norm's statistics.
        seed: For the sample of inputs, and for random initialisations.
        target: What will run the network.

    Raises:
        UserError: Weights or inputs are NaN or infinite, or the target does not take the network;
            the layer is named.
    """
    if batch_norms(model):
        fresh = copied(model)
        reestimate_batch_norm(fresh, images)
        if stale := stale_batch_norms(model, fresh):
            log.warning(
                "batch norm's statistics in the float network are not those of the calibration "
                "images (%s): they are estimated on these before the quantizers are placed",
                listed(stale),
            )
            model = fresh
    quantized = copied(model)
    inputs = collect_inputs(model, [x.name for x in allocation.layers], images, seed)
    prepare(quantized, allocation, *make, inputs, seed)
    reestimate_batch_norm(quantized, images)
    if silent := silent_inputs(quantized, images[0]):
        log.warning(
            "all inputs of %s are quantized to one level, so that nothing before learns; look at "
            "the float network there, or give it more calibration images or bits",
            listed(silent),
        )
    if target is not FLOAT:
        _connect(quantized, target, images, seed)
    return quantized


def stale_batch_norms(model: nn.Module, fresh: nn.Module) -> list[str]:
    """The batch norms with statistics so far from the images' that quantizers would miss them.

    Args:
        model: The float network.
        fresh: A copy whose statistics are those of the images. Few images move them too, but not
            in most channels a deviation by :data:`WIDE`, or a mean by :data:`ASIDE` deviations.
    """
    found = batch_norms(fresh)
    stale = []
    for name, norm in batch_norms(model).items():
        mean, now = (x.get_buffer("running_mean") for x in (norm, found[name]))
        before, after = (x.get_buffer("running_var") + norm.eps for x in (norm, found[name]))
        ratio = (after / before).log().median().abs()
        aside = ((now - mean).abs() / before.sqrt()).median()
        if ratio > 2 * math.log(WIDE) or aside > ASIDE:
            stale.append(name)
    return stale


@torch.no_grad()
def silent_inputs(network: nn.Module, images: Tensor) -> list[str]:
    """The layers with inputs that are all quantized to one level.

    Args:
        network: Prepared and calibrated.
        images: One batch (N, …).
    """
    layers = quantized_layers(network)
    seen: dict[str, set[int]] = {name: set() for name in layers}

    def record(name: str, layer: QuantLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        codes = layer.input_quantizer.quantize(inputs[0].float())
        seen[name] |= {int(codes.min()), int(codes.max())} if codes.numel() else set()

    hooks = {
        name: partial(record, name)
        for name, layer in layers.items()
        if not isinstance(layer.input_quantizer, Indices)
    }
    run_with_hooks(network, images, hooks)
    return [name for name, codes in seen.items() if len(codes) == 1]


@torch.no_grad()
def _connect(network: nn.Module, target: Target, images: Sequence[Tensor], seed: int) -> None:
    """What the target adds; it must not change what a network returns but by rounding.

    Raises:
        UserError: The target does not take the network.
    """
    with evaluating(network):
        expected = network(images[0])
        target.connect(network)
        try:
            target.calibrate(network, images, seed)
            found = network(images[0])
        except RuntimeError as error:
            raise UserError(f"{_UNFOLLOWED} ({first_line(error)}); {_REMEDY}") from error
    if isinstance(expected, Tensor) and found.shape != expected.shape:
        was, now = tuple(expected.shape), tuple(found.shape)
        raise UserError(f"{_UNFOLLOWED} (outputs of shape {now} instead of {was}); {_REMEDY}")
