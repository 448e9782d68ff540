"""A quantized copy of a float network, with batch norm's statistics as quantization makes them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from adq_train.artifacts import BitAllocation
from adq_train.quantization.base import Makers
from adq_train.quantization.copies import copied
from adq_train.quantization.prepare import collect_inputs, prepare
from adq_train.quantization.target import FLOAT, Target
from adq_train.training.batch_norm import reestimate_batch_norm


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
    quantized = copied(model)
    inputs = collect_inputs(model, [x.name for x in allocation.layers], images, seed)
    prepare(quantized, allocation, *make, inputs, seed)
    reestimate_batch_norm(quantized, images)
    target.connect(quantized)
    target.calibrate(quantized, images, seed)
    return quantized
