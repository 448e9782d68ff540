"""Perturbation: quantize one layer of the float model and see how its outputs change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.artifacts import LayerBits, LayerInfo, LayerSensitivity
from adq_train.data.base import Batch
from adq_train.quantization.base import check_choice
from adq_train.quantization.layers import QuantLayer, quantized
from adq_train.quantization.prepare import collect_inputs, quantize_layer, replaced
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.reuse import Runs, make_runs
from adq_train.training.batch_norm import (
    averaged_statistics,
    batch_norms_after,
    kept_statistics,
)

CRITERIA = ("kl", "loss")
TENSORS = ("both", "weights", "activations", "separate")

Key = tuple[str, int]  # what is quantized, and at how many bits


@dataclass(frozen=True)
class Perturbation:
    """Ω[l, b] with only layer l at b bits, on the calibration images (method.md 3).

    Layers are measured one after the other, each on all images, so that the finished ones can be
    kept. What lies before a layer is not computed again for it: its values stay in memory from
    layer to layer (see :class:`~.reuse.PartialRuns`). The numbers are the same without.

    Attributes:
        criterion: ``kl``: mean Kullback–Leibler divergence from the float to the perturbed class
            probabilities, in nats; ``loss``: rise of the mean cross-entropy, which may be negative.
        tensors: What of the layer is quantized: ``weights``, ``activations`` (its input), ``both``
            at once, or ``separate``: each alone, for an allocator that chooses their bits apart.
        recalibrate_batch_norm: Whether the batch norms behind the layer get the statistics of the
            perturbed network first, as training would give them.
        kept_bytes: Most bytes of values to keep between layers, beyond those of one batch; 0 runs
            the whole network for every number.
    """

    criterion: str = "kl"
    tensors: str = "both"
    recalibrate_batch_norm: bool = False
    kept_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("tensors", self.tensors, TENSORS)
        if self.kept_bytes < 0:
            raise ValueError(f"kept_bytes must be at least 0, got {self.kept_bytes}")

    @property
    def name(self) -> str:
        """The metric's name in ``sensitivity.json``."""
        suffix = "-recalibrated" if self.recalibrate_batch_norm else ""
        return f"perturbation-{self.criterion}-{self.tensors}{suffix}"

    @torch.no_grad()
    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Measures one layer after the other; see :class:`~.base.SensitivityMetric`."""
        model = copy.deepcopy(model).eval()
        bit_widths, batches = conditions.bit_widths, conditions.batches
        images = [x for x, _ in batches]
        reference: list[Tensor] = []
        keep = model.register_forward_hook(
            lambda *call: reference.append(F.log_softmax(call[2], 1))
        )
        inputs = collect_inputs(model, [x.name for x in layers], images, conditions.seed)
        keep.remove()
        runs = make_runs(model, images, self.kept_bytes)
        for info in layers:
            variants: dict[Key, dict[str, QuantLayer]] = {}
            for bits in bit_widths:
                forms = quantize_layer(
                    model,
                    LayerBits(info.name, bits, bits),
                    conditions.make_weight_quantizer,
                    conditions.make_activation_quantizer,
                    inputs,
                    conditions.seed,
                )
                for tensors in self._parts():
                    variants[tensors, bits] = {
                        name: only(tensors, layer, model.get_submodule(name))
                        for name, layer in forms.items()
                    }
            differences = self._measure(model, info.name, variants, runs, batches, reference)
            first, *second = ({b: differences[x, b] for b in bit_widths} for x in self._parts())
            apart = second[0] if second else None
            yield LayerSensitivity(info.name, info.num_weights, info.macs, first, apart)

    def _parts(self) -> tuple[str, ...]:
        """What is quantized, one after the other."""
        return ("weights", "activations") if self.tensors == "separate" else (self.tensors,)

    def _measure(
        self,
        model: nn.Module,
        name: str,
        variants: dict[Key, dict[str, QuantLayer]],
        runs: Runs,
        batches: Sequence[Batch],
        reference: Sequence[Tensor],
    ) -> dict[Key, float]:
        """The criterion for each variant of one layer."""
        if not self.recalibrate_batch_norm:
            return self._differences(model, name, variants, runs, batches, reference)
        norms = batch_norms_after(model, name, batches[0][0][:1])
        found: dict[Key, float] = {}
        for key, forms in variants.items():
            with kept_statistics(norms):
                with replaced(model, forms), averaged_statistics(norms):
                    for index in range(len(batches)):
                        runs.from_layer(name, index)()
                variant = {key: forms}
                found |= self._differences(model, name, variant, runs, batches, reference)
        return found

    def _differences(
        self,
        model: nn.Module,
        name: str,
        variants: dict[Key, dict[str, QuantLayer]],
        runs: Runs,
        batches: Sequence[Batch],
        reference: Sequence[Tensor],
    ) -> dict[Key, float]:
        """The criterion's mean over all images."""
        totals = dict.fromkeys(variants, 0.0)
        for index, (_, targets) in enumerate(batches):
            run = runs.from_layer(name, index)
            for key, forms in variants.items():
                with replaced(model, forms):
                    after = F.log_softmax(run(), 1)
                totals[key] += self._difference(reference[index], after, targets)
            del run  # before the next batch's values come
        count = sum(len(logits) for logits in reference)
        return {key: total / count for key, total in totals.items()}

    def _difference(self, before: Tensor, after: Tensor, targets: Tensor) -> float:
        """The criterion's sum over the images of one batch."""
        if self.criterion == "kl":
            return float((before.exp() * (before - after)).sum())
        rise = F.nll_loss(after, targets, reduction="sum")
        return float(rise - F.nll_loss(before, targets, reduction="sum"))


def only(tensors: str, layer: QuantLayer, original: nn.Module) -> QuantLayer:
    """A quantized layer in evaluation mode, with what is not under test left in float.

    Args:
        tensors: ``weights``, ``activations`` or ``both``.
        layer: The quantized layer.
        original: The float layer.
    """
    weight_quantizer = nn.Identity() if tensors == "activations" else layer.weight_quantizer
    input_quantizer = nn.Identity() if tensors == "weights" else layer.input_quantizer
    return quantized(original, weight_quantizer, input_quantizer).eval()  # type: ignore[arg-type]
