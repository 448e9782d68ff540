"""Empirical Fisher information: how much the loss of each image reacts to each weight."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from adq_train.artifacts import LayerInfo, LayerSensitivity
from adq_train.data.base import Batch
from adq_train.errors import UserError, first_line
from adq_train.nested import entries, length, tensors
from adq_train.progress import Progress
from adq_train.sensitivity.base import (
    Conditions,
    Metric,
    layer_weights,
    logits_with,
    plain_copy,
    weight_error,
)
from adq_train.sensitivity.noise import by_bits
from adq_train.sensitivity.outputs import summary

log = logging.getLogger(__name__)

Gradients = dict[str, Tensor]


def squared_gradients(
    model: nn.Module, names: Sequence[str], images: Any, targets: Tensor, gives_loss: bool = False
) -> Gradients:
    """Squares of the gradients of each image's cross-entropy.

    The square of a gradient summed over images is another thing: the images must be told apart.
    ``vmap`` does that for all of them in one pass; a network that it cannot follow, say because
    its control flow looks at values, takes one backward pass per image.

    Args:
        model: In evaluation mode: batch norm then uses its fixed statistics, so that an image's
            loss depends on no other image, and the network is the one of inference.
        names: The layers whose weights are looked at.
        images: (N, C, H, W); or nested tensors (N, …).
        targets: (N,).
        gives_loss: Whether the network gives its loss, and needs no targets.

    Returns:
        By layer, (N, …) with its weight's shape.
    """
    weights = layer_weights(model, names)

    def loss(weights: Gradients, image: Any, target: Tensor) -> Tensor:
        found = logits_with(model, weights, entries(image, None))
        return found.mean() if gives_loss else F.cross_entropy(found, target[None])

    gradient: Callable[[Gradients, Tensor, Tensor], Gradients] = grad(loss)
    try:
        each = vmap(gradient, in_dims=(None, 0, 0))(weights, images, targets)
        return {name: value.square() for name, value in each.items()}
    except RuntimeError as error:
        log.debug("fisher: one image at a time, as vmap fails (%s)", first_line(error))
    squares = {name: value.new_zeros(len(targets), *value.shape) for name, value in weights.items()}
    for index, target in enumerate(targets):
        image = entries(images, index)
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        loss(leaves, image, target).backward()  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                squares[name][index] = leaf.grad.square()
    return squares


@dataclass(frozen=True)
class Fisher(Metric):
    """Ω[l, b] = Σ_i F_ii (ΔW_i)², F_ii = mean over images of (∂ loss / ∂ W_i)².

    Half of it would be the second-order rise of the loss, were F the Hessian; the factor ½ is the
    same for all layers and left out. ΔW is the error of the weight quantizer in use; F is the
    empirical Fisher: targets are those of the calibration images. One pass over the images serves
    all layers and bit-widths, so an interrupted measurement starts anew. Each image has its own
    Σ_i g_i² (ΔW_i)², so the images tell the standard error of their mean.

    Attributes:
        chunk_size: Images whose gradients are in memory at once; each takes as much as the
            weights, and so does ΔW at each bit-width.
    """

    name = "fisher"
    chunk_size: int = 16

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")

    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Measures all layers at once; see :class:`~.base.SensitivityMetric`."""
        model, bit_widths = plain_copy(model).requires_grad_(False), conditions.bit_widths
        errors = {
            x.name: torch.stack([weight_error(model, x.name, b, conditions) for b in bit_widths])
            for x in layers
        }
        each = self.each_image(model, errors, conditions.batches, conditions.gives_loss)
        for info in layers:
            means = zip(bit_widths, map(summary, each[info.name].T), strict=True)
            values, error = by_bits(dict(means))
            yield LayerSensitivity(
                info.name, info.num_weights, info.macs, values, standard_error=error
            )

    def each_image(
        self,
        model: nn.Module,
        errors: Mapping[str, Tensor],
        batches: Sequence[Batch],
        gives_loss: bool = False,
    ) -> dict[str, Tensor]:
        """Σ_i g_i² (ΔW_i)² of every image, for K errors of the weights of some layers.

        Args:
            model: In evaluation mode.
            errors: ΔW by layer, (K, …) with its weight's shape.
            batches: Images (N, C, H, W) and targets (N,).
            gives_loss: Whether the network gives its loss, and needs no targets.

        Returns:
            By layer, (N of all batches, K), float64.

        Raises:
            UserError: Examples cannot be told apart in a batch.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in errors}
        if gives_loss:
            batches = [(x, torch.zeros(length(x))) for x, _ in batches]
        for images, targets in batches:
            if any(not x.dim() or len(x) != len(targets) for _, x in tensors(images)):
                raise UserError(
                    "sensitivity: fisher needs one entry for each example in every tensor of a "
                    "batch; take hessian or perturbation"
                )
        chunks = [
            (entries(images, part), targets[part])
            for images, targets in batches
            for start in range(0, len(targets), self.chunk_size)
            for part in [slice(start, start + self.chunk_size)]
        ]
        with Progress("gradients", total=len(chunks)) as progress:
            for images, targets in chunks:
                squares = squared_gradients(model, list(errors), images, targets, gives_loss)
                for name, value in squares.items():
                    square = errors[name].double().square().flatten(1)
                    found[name].append(value.double().flatten(1) @ square.T)
                progress.advance(f"{len(targets)} images")
        return {name: torch.cat(values) for name, values in found.items()}
