"""Bit-widths learned by gradient descent within the budget: the rival of measured sensitivities."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.allocation.budget import Problem
from adq_train.artifacts import LEARNED, LayerBits, LayerInfo, LayerSensitivity
from adq_train.data.base import derived_seed
from adq_train.errors import UserError
from adq_train.progress import Progress
from adq_train.quantization.functional import at_least_float32
from adq_train.quantization.mixture import Choice, LayerChoice, mix_layer
from adq_train.quantization.prepare import Upkeep, collect_inputs, quantize_layer, swap
from adq_train.sensitivity.base import Conditions, Training, plain_copy
from adq_train.training.optimizers import Optimizers

log = logging.getLogger(__name__)

Choices = Mapping[str, LayerChoice]  # of the mixed layers

# Of Adam, with a short memory: gradients are far larger above the budget than below it, and a
# running mean that remembers those for long overshoots, and then hardly moves any more.
BETAS = (0.5, 0.99)


@dataclass(frozen=True)
class ExpectedCost:
    """The mean cost of bits that are drawn by their shares, in units of one budget's bound.

    Attributes:
        name: Name of the budget.
        pinned: What the pinned layers cost, as a part of the bound.
        options: For each mixed layer what each of its options costs, as parts of the bound;
            (options,) float64.
    """

    name: str
    pinned: float
    options: dict[str, Tensor]

    def __call__(self, choices: Choices) -> Tensor:
        """E[cost] / bound, () float64; above 1 the budget is exceeded on average."""
        parts = [(x * choices[name].option_shares()).sum() for name, x in self.options.items()]
        return torch.stack(parts).sum() + self.pinned


def expected_costs(problem: Problem, device: torch.device) -> list[ExpectedCost]:
    """One for each limit of the budget."""
    pinned = problem.pinned_bits()
    ends = [x for x in problem.layers if x.name in pinned]
    return [
        ExpectedCost(
            limit.name,
            limit.total(ends, pinned) / limit.bound,
            {
                layer.name: torch.tensor(
                    [limit.cost(layer, bits) / limit.bound for bits in problem.options(layer)],
                    dtype=torch.float64,
                    device=device,
                )
                for layer in problem.mixed
            },
        )
        for limit in problem.limits()
    ]


def excess(costs: Sequence[ExpectedCost], choices: Choices) -> Tensor:
    """Σ over the budgets of max(0, E[cost] / bound - 1), ()."""
    return torch.stack([(cost(choices) - 1).clamp_min(0) for cost in costs]).sum()


@dataclass(frozen=True)
class Learned:
    """Ω[l, b] = -log p_l(b), with p_l the share of b bits that a short training gives layer l.

    Differentiable search as in EdMIPS (Cai & Vasconcelos 2020, arXiv 2004.05795), after DNAS (Wu
    et al. 2018, arXiv 1812.00090). Each layer with a choice computes with Σ_b p_l(b) · Q_b of its
    weight and of its input, p_l = softmax of its logits: one vector for both where bits are tied,
    else two. The least Σ Ω is then the most probable allocation that keeps to the budget.

    Weights, quantizers and logits are trained together, on the training images, in one loss:

        cross-entropy + penalty · Σ over the budgets of max(0, E[cost] / bound - 1)

    The budget is a bound here, so the pressure ends where it is met, and a penalty need only be
    steeper than the loss; a price on the cost itself, EdMIPS's, would have to be tuned until the
    cost comes out right. A copy of the float network is trained, throughout at the rates that QAT
    begins with; codebooks follow their weights as in QAT. Batch norm uses the statistics of each
    batch. Pinned layers have their own bits.

    The search covers all layers of the model, whichever are asked for, so an interrupted one
    starts anew, and each of several processes makes the whole of it. Bits that a layer had no
    choice of have the Ω of logits that were never moved, log of the number of candidates.

    Attributes:
        epochs: Of the search.
        lr: Learning rate of the logits (Adam), constant.
        penalty: Cross-entropy that exceeding a budget by its whole size would cost.
    """

    name = LEARNED
    epochs: int = 10
    lr: float = 0.2
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        for name in ("lr", "penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")

    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Searches once for all layers; see :class:`~.base.SensitivityMetric`.

        Raises:
            UserError: There are no training images and budget, or the training fails.
        """
        training = conditions.training
        if training is None:
            raise UserError(
                "sensitivity: learned trains on training images within a budget, which only a run "
                "has; use adq-train sensitivity=learned, or another metric here"
            )
        choices = self.search(model, conditions, training)
        no_preference = dict.fromkeys(conditions.bit_widths, math.log(len(conditions.bit_widths)))
        for info in layers:
            weights, inputs = dict(no_preference), dict(no_preference)
            if info.name in choices:
                weights |= choices[info.name].weights.surprise()
                inputs |= choices[info.name].inputs.surprise()
            yield LayerSensitivity(
                info.name,
                info.num_weights,
                info.macs,
                weights,
                None if training.problem.tied else inputs,
            )

    def search(self, model: nn.Module, conditions: Conditions, training: Training) -> Choices:
        """Trains the shares of every mixed layer's candidates.

        Args:
            model: The float network; left as it was.
            conditions: Quantizers, their calibration images and the seed.
            training: Images, rates and budget.

        Returns:
            The choices by layer.

        Raises:
            UserError: The loss or a logit becomes NaN or infinite.
        """
        model = plain_copy(model)
        device = next(model.parameters()).device
        choices = open_choices(training.problem, device)
        mix(model, choices, conditions, training.problem)
        logits = [x.logits for x in distinct(choices)]
        adam = torch.optim.Adam(logits, self.lr, BETAS)
        optimizers = Optimizers(*training.make_optimizers(model).parts, adam)
        costs = expected_costs(training.problem, device)
        upkeep = Upkeep(model)
        model.train()
        generators = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(generators), Progress("search", self.epochs) as progress:
            torch.manual_seed(derived_seed(conditions.seed, "search"))  # dropout
            for epoch in range(self.epochs):
                for images, targets in training.batches.epoch(epoch):
                    loss = F.cross_entropy(at_least_float32(model(images)), targets)
                    optimizers.zero_grad()
                    (loss + self.penalty * excess(costs, choices)).backward()  # type: ignore[no-untyped-call]
                    upkeep.before_step()
                    optimizers.step()
                    upkeep.after_step()
                last = float(loss.detach())
                if not all(x.isfinite().all() for x in (loss, *logits)):
                    raise UserError(
                        f"sensitivity: the search of learned is not finite after epoch {epoch + 1} "
                        f"(loss {last:.3g}); lower optimizer.lr or sensitivity.lr"
                    )
                spent = ", ".join(f"{x.name} {float(x(choices).detach()):.3f}" for x in costs)
                progress.advance(f"loss {last:.3f}, parts of the budget: {spent}")
        return choices


def open_choices(problem: Problem, device: torch.device) -> Choices:
    """A choice without a preference for every mixed layer."""
    choices = {}
    for layer in problem.mixed:
        widths = problem.widths(layer)
        weights = Choice.among(widths, device)
        inputs = weights if problem.tied else Choice.among(widths, device)
        choices[layer.name] = LayerChoice(weights, inputs)
    return choices


def distinct(choices: Choices) -> list[Choice]:
    """All choices, one of a tied pair once."""
    pairs = choices.values()
    return [x.weights for x in pairs] + [x.inputs for x in pairs if not x.tied]


def mix(model: nn.Module, choices: Choices, conditions: Conditions, problem: Problem) -> None:
    """Replaces every layer by its mixture, or by its pinned form, in place.

    Args:
        model: The float network, in evaluation mode.
        choices: Of the mixed layers.
        conditions: Quantizers, and the images that they are calibrated with.
        problem: The layers and the pins.
    """
    names, images = [x.name for x in problem.layers], (x for x, _ in conditions.batches)
    inputs = collect_inputs(model, names, images, conditions.seed)
    make = conditions.make_weight_quantizer, conditions.make_activation_quantizer
    for name in names:
        if name in choices:
            forms = mix_layer(model, name, choices[name], *make, inputs, conditions.seed)
        else:
            bits = LayerBits(name, problem.pinned[name], problem.pinned[name])
            forms = quantize_layer(model, bits, *make, inputs, conditions.seed)
        swap(model, forms)
