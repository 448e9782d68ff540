"""What every sensitivity metric can do, and what those that look at weights alone share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adq_train.allocation.allocator import not_apart
from adq_train.allocation.budget import Problem
from adq_train.artifacts import LayerInfo, LayerSensitivity
from adq_train.data.base import Batch, Batches, derived_seed
from adq_train.errors import UserError
from adq_train.quantization.base import MakeActivationQuantizer, MakeWeightQuantizer
from adq_train.quantization.copies import own_copy
from adq_train.quantization.layer_weights import kept_weight, used_weight
from adq_train.quantization.prepare import keep_weights
from adq_train.training.optimizers import Optimizers


@dataclass(frozen=True)
class Training:
    """What a metric needs besides that trains.

    Attributes:
        batches: The training images.
        make_optimizers: QAT's, at its first rates, for the parameters of a prepared network.
        problem: What is to be chosen, within which budget.
    """

    batches: Batches
    make_optimizers: Callable[[nn.Module], Optimizers]
    problem: Problem


@dataclass(frozen=True)
class Conditions:
    """Under what every layer of a network is measured.

    Attributes:
        bit_widths: The candidates.
        batches: Calibration images (N, C, H, W) and targets (N,).
        make_weight_quantizer: Maps a bit-width to a quantizer.
        make_activation_quantizer: Maps a bit-width to a quantizer.
        seed: For everything that is drawn at random.
        training: For a metric that trains; None where there is nothing to train on.
        gives_loss: Whether what the network gives is a loss, (N, 1) or (1, 1) for a batch.
    """

    bit_widths: Sequence[int]
    batches: Sequence[Batch]
    make_weight_quantizer: MakeWeightQuantizer
    make_activation_quantizer: MakeActivationQuantizer
    seed: int = 0
    training: Training | None = None
    gives_loss: bool = False


class SensitivityMetric(Protocol):
    """Measures what quantizing each layer costs; higher is worse."""

    @property
    def name(self) -> str:
        """The metric's name in ``sensitivity.json``."""
        ...

    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Measures one layer after the other.

        A layer's values do not depend on which other layers are asked for: what was measured
        before an interruption need not be measured again.

        Args:
            model: The float network; left as it was.
            layers: The layers to measure.
            conditions: Candidates, images and quantizers.

        Yields:
            The sensitivity of one layer at every candidate.

        Raises:
            UserError: A layer cannot be measured; it is named.
        """
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A metric that can tell before any training whether it has what it will need."""

    def check(self, layers: Sequence[LayerInfo], bit_widths: Sequence[int], apart: bool) -> None:
        """Refuses what would fail once the float model is trained.

        Args:
            layers: All quantizable layers.
            bit_widths: The candidates.
            apart: Whether the effects of weights and of inputs will be asked for apart.

        Raises:
            UserError: Says what is missing.
        """
        ...


class Metric(ABC):
    """What the metrics have in common."""

    tensors: str = "weights"  # what they quantize; of some a field, one of forms.TENSORS

    @property
    @abstractmethod
    def name(self) -> str:
        """The metric's name in ``sensitivity.json``."""

    def check(self, layers: Sequence[LayerInfo], bit_widths: Sequence[int], apart: bool) -> None:
        """Refuses to tell apart what is not measured apart; see :class:`ReadsAhead`.

        Raises:
            UserError: Effects are asked for apart, and ``tensors`` is not ``separate``.
        """
        if apart and self.tensors != "separate":
            raise UserError(not_apart(self.name))


@torch.no_grad()
def weight_error(model: nn.Module, name: str, bit_width: int, conditions: Conditions) -> Tensor:
    """ΔW = Ŵ - W of one layer, with the quantizer as it is initialised from W.

    Args:
        model: The float network.
        name: The layer.
        bit_width: b.
        conditions: Hold the quantizer, and the seed of its random initialisations.

    Returns:
        Of the weight's shape.

    Raises:
        UserError: The weights are NaN or infinite; the layer is named.
    """
    weight = layer_weight(model, name).detach()
    quantizer = conditions.make_weight_quantizer(bit_width).to(weight.device).eval()
    try:
        quantizer.calibrate(weight, derived_seed(conditions.seed, name))
    except ValueError as error:
        raise UserError(f"layer {name}: {error}; check the float model") from error
    quantized: Tensor = quantizer(weight)
    return quantized - weight


def layer_weight(model: nn.Module, name: str) -> Tensor:
    """The weight that the layer ``name`` uses, float32."""
    return used_weight(model.get_submodule(name))


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy to measure, in evaluation mode: every quantizable layer computes with its own weight.

    A weight that was made anew in every forward pass is a parameter there, so that
    :func:`logits_with` can replace it.
    """
    model = own_copy(model).eval()
    keep_weights(model)
    return model


def layer_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the weights of some layers of a plain copy, by layer, for :func:`logits_with`."""
    found = {}
    for name in names:
        weight = kept_weight(model.get_submodule(name))
        assert weight is not None
        found[name] = weight.detach().clone()
    return found


def logits_with(model: nn.Module, weights: Mapping[str, Tensor], images: Any) -> Tensor:
    """The outputs of a network as a function of the weights of some of its layers.

    A weight that two layers have in common goes by the name of the first, and is replaced in both,
    as it would be quantized in both; a layer that is called more than once has one weight.

    Args:
        model: A plain copy, with weights of its own, which are not used.
        weights: By layer.
        images: (N, C, H, W).

    Returns:
        Logits (N, num_classes).
    """
    named = {f"{name}.weight": weight for name, weight in weights.items()}
    logits: Tensor = functional_call(model, named, (images,))
    return logits
