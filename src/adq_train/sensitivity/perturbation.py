"""Perturbation: quantize one layer of the float model and see how its outputs change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.artifacts import LayerInfo, LayerSensitivity
from adq_train.data.base import Batch
from adq_train.errors import UserError
from adq_train.nested import few
from adq_train.quantization.base import check_choice
from adq_train.quantization.prepare import collect_inputs, replaced
from adq_train.sensitivity.base import Conditions, Metric, plain_copy
from adq_train.sensitivity.forms import TENSORS, Forms, Key, quantized_forms, row
from adq_train.sensitivity.outputs import num_columns, rounding, summary
from adq_train.sensitivity.reuse import Runs, make_runs
from adq_train.training.batch_norm import (
    averaged_statistics,
    batch_norms_after,
    kept_statistics,
    reestimate_batch_norm,
)

CRITERIA = ("kl", "loss", "mse")


@dataclass(frozen=True)
class Study:
    """What one layer after the other is measured in.

    Attributes:
        model: The float network.
        runs: Runs it from any layer on.
        batches: The calibration images.
        outputs: Of the float network, (N, num_classes) for each batch.
        scale: What the criterion is divided by.
        smallest: A criterion of no larger magnitude is the rounding of the outputs.
    """

    model: nn.Module
    runs: Runs
    batches: Sequence[Batch]
    outputs: Sequence[Tensor]
    scale: float
    smallest: float


@dataclass(frozen=True)
class Perturbation(Metric):
    """Ω[l, b] with only layer l at b bits, on the calibration images.

    Layers are measured one after the other, each on all images, so that the finished ones can be
    kept. What lies before a layer is not computed again for it: its values stay in memory from
    layer to layer (see :class:`~.reuse.PartialRuns`). The numbers are the same without.

    Ω is a mean over the images, so the images also tell its standard error. The criterion is taken
    in float64, and what is no larger than the rounding of the outputs themselves counts as 0.

    Attributes:
        criterion: ``kl``: mean Kullback–Leibler divergence from the float to the perturbed class
            probabilities, in nats; ``loss``: rise of the mean cross-entropy, which may be negative;
            ``mse``: mean squared distance of the outputs, relative to their variance, for outputs
            that are no logits of two or more classes.
        tensors: What of the layer is quantized: ``weights``, ``activations`` (its input), ``both``
            at once, or ``separate``: each alone, for an allocator that chooses their bits apart.
        recalibrate_batch_norm: Whether the batch norms behind the layer get the statistics of the
            perturbed network on the calibration images first, as training would give them; those
            of the float network are estimated from the same images then.
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
        model = plain_copy(model)
        batches = conditions.batches
        images = [x for x, _ in batches]
        inputs = collect_inputs(model, [x.name for x in layers], images, conditions.seed)
        if self.recalibrate_batch_norm:
            reestimate_batch_norm(model, images)
        outputs = [model(x) for x in images]
        if self.criterion != "mse" and not conditions.gives_loss and num_columns(outputs[0]) == 1:
            raise UserError(
                f"sensitivity.criterion: {self.criterion} needs two or more outputs for an image, "
                "but the model has one, and softmax over one class is always 1; set criterion=mse "
                "(squared distance of the outputs)"
            )
        runs = make_runs(model, images, self.kept_bytes)
        study = Study(model, runs, batches, outputs, *self._scale(outputs))
        for info in layers:
            variants = quantized_forms(model, info.name, self.tensors, inputs, conditions)
            differences = self._measure(info.name, variants, study)
            found = {
                key: summary(x / study.scale, study.smallest) for key, x in differences.items()
            }
            yield row(info, self.tensors, found)

    def _measure(self, name: str, variants: Forms, study: Study) -> dict[Key, Tensor]:
        """The criterion (N,) of all images for each variant of one layer."""
        if not self.recalibrate_batch_norm:
            return self._differences(name, variants, study)
        norms = batch_norms_after(study.model, name, few(study.batches[0][0], 1))
        found: dict[Key, Tensor] = {}
        for key, forms in variants.items():
            with kept_statistics(norms):
                with replaced(study.model, forms), averaged_statistics(norms):
                    for index in range(len(study.batches)):
                        study.runs.from_layer(name, index)()
                found |= self._differences(name, {key: forms}, study)
        return found

    def _differences(self, name: str, variants: Forms, study: Study) -> dict[Key, Tensor]:
        """As :meth:`_measure`, with the statistics of the batch norms as they are."""
        each: dict[Key, list[Tensor]] = {key: [] for key in variants}
        for index, (_, targets) in enumerate(study.batches):
            run = study.runs.from_layer(name, index)
            before = self._form(study.outputs[index])
            for key, forms in variants.items():
                with replaced(study.model, forms):
                    after = self._form(run())
                each[key].append(self._difference(before, after, targets))
            del run  # before the next batch's values come
        return {key: torch.cat(x) for key, x in each.items()}

    def _form(self, outputs: Tensor) -> Tensor:
        """What the criterion compares, in float64: at few changed bits differences are tiny."""
        outputs = outputs.double()
        return outputs if self.criterion == "mse" else F.log_softmax(outputs, 1)

    def _difference(self, before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
        """The criterion for each image of a batch (N,); sums over the places of a map."""
        if self.criterion == "mse":
            found = (after - before).square()
        elif self.criterion == "kl":
            found = before.exp() * (before - after)
        else:
            found = F.nll_loss(after, targets, reduction="none")
            found = found - F.nll_loss(before, targets, reduction="none")
        return found.reshape(len(found), -1).sum(1)

    def _scale(self, outputs: Sequence[Tensor]) -> tuple[float, float]:
        """What the criterion is divided by, and what of it the rounding of the outputs explains.

        An error of δ in the outputs makes a squared distance of ‖δ‖², a divergence of at most
        ½ ‖δ‖², and a loss of about ‖δ‖.
        """
        error = rounding(outputs)
        if self.criterion == "loss":
            return 1.0, error
        images = torch.cat([x.reshape(len(x), -1) for x in outputs]).double()
        variance = float((images - images.mean(0)).square().sum(1).mean())
        # Outputs of one image, or that are all the same, have none.
        scale = variance or 1.0 if self.criterion == "mse" else 1.0
        return scale, error**2 / scale


@dataclass(frozen=True)
class LossRise(Perturbation):
    """Ω[l, b]: by how much a loss of one's own rises, for networks that give their loss.

    Otherwise it is :class:`Perturbation` with ``criterion="loss"``. Of a loss that is one number
    for a batch, each batch counts the same.
    """

    criterion: str = "loss"

    def _form(self, outputs: Tensor) -> Tensor:
        return outputs.double()

    def _difference(self, before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
        return (after - before).squeeze(1)
