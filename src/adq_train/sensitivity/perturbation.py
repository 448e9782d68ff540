"""Perturbation: quantize one layer of the float model and see how its outputs change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.artifacts import LayerBits, LayerInfo, LayerSensitivity, SensitivityTable
from adq_train.data.base import Batch
from adq_train.quantization.base import (
    MakeActivationQuantizer,
    MakeWeightQuantizer,
    check_choice,
)
from adq_train.quantization.prepare import collect_inputs, quantize_layer, replaced

CRITERIA = ("kl", "loss")
TENSORS = ("both", "weights", "activations")


@dataclass(frozen=True)
class Perturbation:
    """Ω[l, b] with only layer l at b bits, on the calibration images (method.md 3).

    Attributes:
        criterion: ``kl``: mean Kullback–Leibler divergence from the float to the perturbed class
            probabilities, in nats; ``loss``: rise of the mean cross-entropy, which may be negative.
        tensors: What of the layer is quantized: ``weights``, ``activations`` (its input) or
            ``both``.
    """

    criterion: str = "kl"
    tensors: str = "both"

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("tensors", self.tensors, TENSORS)

    @property
    def name(self) -> str:
        """The metric's name in ``sensitivity.json``."""
        return f"perturbation-{self.criterion}-{self.tensors}"

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        layers: Sequence[LayerInfo],
        bit_widths: Sequence[int],
        batches: Sequence[Batch],
        make_weight_quantizer: MakeWeightQuantizer,
        make_activation_quantizer: MakeActivationQuantizer,
        seed: int,
    ) -> Iterator[LayerSensitivity]:
        """Measures one layer after the other.

        Args:
            model: The float network; left as it was.
            layers: The layers to measure.
            bit_widths: The candidates.
            batches: Calibration images and targets.
            make_weight_quantizer: Maps a bit-width to a quantizer.
            make_activation_quantizer: Maps a bit-width to a quantizer.
            seed: For random initialisations, and for the sample of inputs.

        Yields:
            The sensitivity of one layer at every candidate.
        """
        model = copy.deepcopy(model).eval()
        inputs = collect_inputs(model, [x.name for x in layers], (x for x, _ in batches), seed)
        reference = [F.log_softmax(model(images), 1) for images, _ in batches]
        for info in layers:
            values: dict[int, float] = {}
            for bit_width in bit_widths:
                forms = quantize_layer(
                    model,
                    LayerBits(info.name, bit_width, bit_width),
                    make_weight_quantizer,
                    make_activation_quantizer,
                    inputs,
                    seed,
                )
                # A quantizer that is not under test gives way to one that does nothing.
                for layer in forms.values():
                    if self.tensors == "activations":
                        layer.weight_quantizer = nn.Identity()  # type: ignore[assignment]
                    if self.tensors == "weights":
                        layer.input_quantizer = nn.Identity()  # type: ignore[assignment]
                with replaced(model, forms):
                    values[bit_width] = self._difference(model, batches, reference)
            yield LayerSensitivity(info.name, info.num_weights, info.macs, values)

    def _difference(
        self, model: nn.Module, batches: Sequence[Batch], reference: Sequence[Tensor]
    ) -> float:
        """The criterion's mean over all images."""
        total, count = 0.0, 0
        for (images, targets), before in zip(batches, reference, strict=True):
            after = F.log_softmax(model(images), 1)
            if self.criterion == "kl":
                total += float((before.exp() * (before - after)).sum())
            else:
                rise = F.nll_loss(after, targets, reduction="sum")
                total += float(rise - F.nll_loss(before, targets, reduction="sum"))
            count += len(images)
        return total / count


def table(
    metric: str, bit_widths: Sequence[int], layers: Sequence[LayerSensitivity]
) -> SensitivityTable:
    """The finished table of a metric."""
    return SensitivityTable(metric, tuple(bit_widths), tuple(layers))
