"""Hessian trace: how curved the loss is along the weights of each layer (HAWQ-V2)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adq_train.allocation.patterns import listed
from adq_train.artifacts import LayerInfo, LayerSensitivity
from adq_train.data.base import Batch, derived_seed
from adq_train.progress import Progress
from adq_train.quantization.layers import quantized_kind
from adq_train.sensitivity.base import (
    Conditions,
    Metric,
    layer_weights,
    logits_with,
    plain_copy,
    weight_error,
)

log = logging.getLogger(__name__)

# With fewer probes their spread is too uncertain to stop by.
FEWEST_PROBES = 8


@dataclass(frozen=True)
class TraceEstimate:
    """Mean and standard error of the trace of one layer's block of the Hessian."""

    trace: float
    standard_error: float

    def reached(self, relative: float) -> bool:
        """Whether the standard error is at most this share of the trace's magnitude."""
        return self.standard_error <= relative * abs(self.trace)


def probe(weights: dict[str, Tensor], seed: int, number: int) -> dict[str, Tensor]:
    """Rademacher vectors, -1 or 1, of the weights' shapes; drawn on the CPU, layer by layer."""
    vectors = {}
    for name, weight in weights.items():
        generator = torch.Generator().manual_seed(derived_seed(seed, name, number))
        bits = torch.randint(2, weight.shape, generator=generator)
        vectors[name] = (2 * bits - 1).to(weight)
    return vectors


def curvatures(
    model: nn.Module,
    weights: dict[str, Tensor],
    vectors: dict[str, Tensor],
    batches: Sequence[Batch],
    gives_loss: bool = False,
) -> dict[str, float]:
    """v_l · (H v)_l of every layer l, H the Hessian of the mean cross-entropy over all images.

    One product H v serves all layers: the other layers' vectors are independent of v_l, so what
    they add to the product with it is zero on average.

    Args:
        model: In evaluation mode.
        weights: By layer.
        vectors: v by layer, of the weights' shapes.
        batches: Images (N, C, H, W) and targets (N,).
        gives_loss: Whether the network gives its loss, and needs no targets; each batch then counts
            the same.
    """
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    totals = dict.fromkeys(weights, 0.0)
    count = len(batches) if gives_loss else sum(len(targets) for _, targets in batches)
    for images, targets in batches:
        # Other kernels of attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            found = logits_with(model, leaves, images)
            total = partial(F.cross_entropy, target=targets, reduction="sum")
            loss = found.mean() if gives_loss else total(found)
            gradients = torch.autograd.grad(
                loss / count, list(leaves.values()), create_graph=True, materialize_grads=True
            )
            slope = sum(
                ((g * v).sum() for g, v in zip(gradients, vectors.values(), strict=True)),
                found.new_zeros(()),
            )
            products = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
        for name, product in zip(leaves, products, strict=True):
            totals[name] += float((product * vectors[name]).double().sum())
    return totals


@dataclass(frozen=True)
class Hessian(Metric):
    """Ω[l, b] = (Tr H_l / n_l) · ‖ΔW_l‖², the average trace (HAWQ-V2, arXiv 1911.03852).

    H_l is the block of the Hessian of the mean cross-entropy over the calibration images, n_l the
    number of the layer's weights, ΔW the error of the weight quantizer in use. Tr H_l is estimated
    with random vectors of ±1 (Hutchinson), and batch norm uses its fixed statistics. Probing ends
    when the standard error of every layer is small enough, or at ``max_probes`` with a warning.
    It covers every quantizable layer of the model, whichever are asked for, so that a layer's
    value never depends on the others asked for; an interrupted measurement starts anew.

    A trace may be negative where the float model is not at a minimum. Then the sensitivity is
    negative too. The standard error of Ω is that of the trace, over the random vectors.

    Attributes:
        relative_standard_error: Probing ends when no layer's standard error is a larger share of
            its trace.
        max_probes: At most this many random vectors, at least 2.
    """

    name = "hessian"
    relative_standard_error: float = 0.1
    max_probes: int = 100

    def __post_init__(self) -> None:
        if not self.relative_standard_error > 0:
            raise ValueError(
                f"relative_standard_error must be more than 0, got {self.relative_standard_error}"
            )
        if self.max_probes < 2:
            raise ValueError(f"max_probes must be at least 2, got {self.max_probes}")

    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Measures all layers at once; see :class:`~.base.SensitivityMetric`."""
        model = plain_copy(model).requires_grad_(False)
        traces = self.traces(model, conditions.batches, conditions.seed, conditions.gives_loss)
        low = [x.name for x in layers if traces[x.name].trace < -traces[x.name].standard_error]
        if low:
            log.warning(
                "hessian: the trace is negative for %s: the float model is not at a minimum",
                listed(low),
            )
        for info in layers:
            estimate = traces[info.name]
            values, errors = {}, {}
            for bits in conditions.bit_widths:
                error = weight_error(model, info.name, bits, conditions)
                squares = float(error.double().square().sum())
                values[bits] = estimate.trace / info.num_weights * squares
                errors[bits] = estimate.standard_error / info.num_weights * squares
            yield LayerSensitivity(
                info.name, info.num_weights, info.macs, values, standard_error=errors
            )

    def traces(
        self, model: nn.Module, batches: Sequence[Batch], seed: int, gives_loss: bool = False
    ) -> dict[str, TraceEstimate]:
        """The trace of every quantizable layer's block of the Hessian, with its standard error.

        Args:
            model: In evaluation mode.
            batches: Images (N, C, H, W) and targets (N,).
            seed: Of the random vectors.
            gives_loss: Whether the network gives its loss.

        Returns:
            By layer.
        """
        names = [name for name, m in model.named_modules() if quantized_kind(m)]
        weights = layer_weights(model, names)
        samples: list[list[float]] = []
        estimates: dict[str, TraceEstimate] = {}
        open_layers = names
        with Progress("probes", total=self.max_probes) as progress:
            while open_layers and len(samples) < self.max_probes:
                vectors = probe(weights, seed, len(samples))
                samples.append(
                    list(curvatures(model, weights, vectors, batches, gives_loss).values())
                )
                values = torch.tensor(samples, dtype=torch.float64)
                if len(samples) >= min(FEWEST_PROBES, self.max_probes):
                    errors = values.std(0) / len(samples) ** 0.5
                    estimates = {
                        name: TraceEstimate(float(mean), float(error))
                        for name, mean, error in zip(names, values.mean(0), errors, strict=True)
                    }
                    open_layers = [
                        name
                        for name, estimate in estimates.items()
                        if not estimate.reached(self.relative_standard_error)
                    ]
                progress.advance(f"{len(names) - len(open_layers)} of {len(names)} layers settled")
        for name, estimate in estimates.items():
            log.debug(
                "hessian: trace of %s %.4g ± %.2g", name, estimate.trace, estimate.standard_error
            )
        if open_layers:
            log.warning(
                "hessian: after %d probes the standard error is still above %g of the trace for %s;"
                " raise sensitivity.max_probes or use more calibration images",
                *(len(samples), self.relative_standard_error, ", ".join(open_layers)),
            )
        return estimates
