"""A quantized copy of a float network, with batch norm's statistics as quantization makes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adq_train.artifacts import BitAllocation
from adq_train.errors import UserError, first_line
from adq_train.quantization.base import Makers
from adq_train.quantization.copies import copied
from adq_train.quantization.layer_weights import evaluating
from adq_train.quantization.prepare import collect_inputs, prepare
from adq_train.quantization.target import FLOAT, Target
from adq_train.training.batch_norm import batch_norms, reestimate_batch_norm

log = logging.getLogger(__name__)

# Inputs so many times as large as expected lie beyond all thresholds, where no gradient is.
FAR = 8
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

    def made_from(network: nn.Module) -> nn.Module:
        made = copied(network)
        inputs = collect_inputs(network, [x.name for x in allocation.layers], images, seed)
        prepare(made, allocation, *make, inputs, seed)
        reestimate_batch_norm(made, images)
        return made

    quantized = made_from(model)
    if stale := stale_batch_norms(model, quantized):
        log.warning(
            "batch norm's statistics in the float network are not those of the calibration images "
            "(%s and %d more): they are estimated on these before the quantizers are placed",
            stale[0], len(stale) - 1,
        )  # fmt: skip
        fresh = copied(model)
        reestimate_batch_norm(fresh, images)
        quantized = made_from(fresh)
    if target is not FLOAT:
        _connect(quantized, target, images, seed)
    return quantized


def stale_batch_norms(model: nn.Module, quantized: nn.Module) -> list[str]:
    """The batch norms with statistics so far from the images' that quantizers would miss them.

    Args:
        model: The float network.
        quantized: A quantized copy whose statistics are those of the images. Quantization moves
            them too, but not by a standard deviation that is :data:`FAR` times another one.
    """
    found = batch_norms(quantized)
    stale = []
    for name, norm in batch_norms(model).items():
        before, after = norm.running_var, found[name].running_var
        assert before is not None
        assert after is not None
        ratio = ((after + norm.eps) / (before + norm.eps)).log().median().abs()
        if ratio > 2 * math.log(FAR):
            stale.append(name)
    return stale


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
