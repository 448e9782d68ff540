"""Empirical Fisher information: how much the loss of each image reacts to each weight."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from adq_train.artifacts import LayerInfo, LayerSensitivity
from adq_train.data.base import Batch
from adq_train.reporting.progress import Progress
from adq_train.sensitivity.base import (
    Conditions,
    WeightMetric,
    layer_weights,
    logits_with,
    plain_copy,
    weight_error,
)

log = logging.getLogger(__name__)

Gradients = dict[str, Tensor]


def squared_gradients(
    model: nn.Module, names: Sequence[str], images: Tensor, targets: Tensor
) -> Gradients:
    """Squares of the gradients of each image's cross-entropy, summed over the images.

    The square of a gradient summed over images is another thing: the images must be told apart.
    ``vmap`` does that for all of them in one pass; a network that it cannot follow, say because
    its control flow looks at values, takes one backward pass per image.

    Args:
        model: In evaluation mode: batch norm then uses its fixed statistics, so that an image's
            loss depends on no other image, and the network is the one of inference.
        names: The layers whose weights are looked at.
        images: (N, C, H, W).
        targets: (N,).

    Returns:
        By layer, of its weight's shape.
    """
    weights = layer_weights(model, names)

    def loss(weights: Gradients, image: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits_with(model, weights, image[None]), target[None])

    gradient: Callable[[Gradients, Tensor, Tensor], Gradients] = grad(loss)
    try:
        each = vmap(gradient, in_dims=(None, 0, 0))(weights, images, targets)
        return {name: value.square().sum(0) for name, value in each.items()}
    except RuntimeError as error:
        log.debug("fisher: one image at a time, as vmap fails (%s)", str(error).splitlines()[0])
    sums = {name: torch.zeros_like(value) for name, value in weights.items()}
    for image, target in zip(images, targets, strict=True):
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        loss(leaves, image, target).backward()  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                sums[name] += leaf.grad.square()
    return sums


@dataclass(frozen=True)
class Fisher(WeightMetric):
    """Ω[l, b] = Σ_i F_ii (ΔW_i)², F_ii = mean over images of (∂ loss / ∂ W_i)² (method.md 3).

    Half of it would be the second-order rise of the loss, were F the Hessian; the factor ½ is the
    same for all layers and left out. ΔW is the error of the weight quantizer in use; F is the
    empirical Fisher: targets are those of the calibration images. One pass over the images serves
    all layers and bit-widths, so an interrupted measurement starts anew.

    Attributes:
        chunk_size: Images whose gradients are in memory at once; each takes as much as the weights.
    """

    chunk_size: int = 16

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")

    @property
    def name(self) -> str:
        """The metric's name in ``sensitivity.json``."""
        return "fisher"

    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Measures all layers at once; see :class:`~.base.SensitivityMetric`."""
        model = plain_copy(model).requires_grad_(False)
        fisher = self.diagonal(model, [x.name for x in layers], conditions.batches)
        for info in layers:
            values = {}
            for bits in conditions.bit_widths:
                error = weight_error(model, info.name, bits, conditions)
                values[bits] = float((fisher[info.name] * error.double().square()).sum())
            yield LayerSensitivity(info.name, info.num_weights, info.macs, values)

    def diagonal(
        self, model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
    ) -> Gradients:
        """F_ii of the weights of some layers.

        Args:
            model: In evaluation mode.
            names: The layers.
            batches: Images (N, C, H, W) and targets (N,).

        Returns:
            By layer, float64, of its weight's shape.
        """
        totals = {k: torch.zeros_like(v).double() for k, v in layer_weights(model, names).items()}
        size = self.chunk_size
        chunks = [
            (images[start : start + size], targets[start : start + size])
            for images, targets in batches
            for start in range(0, len(images), size)
        ]
        with Progress("gradients", total=len(chunks)) as progress:
            for images, targets in chunks:
                for name, value in squared_gradients(model, names, images, targets).items():
                    totals[name] += value
                progress.advance(f"{len(images)} images")
        count = sum(len(images) for images, _ in chunks)
        return {name: value / count for name, value in totals.items()}
