"""What ``quantize()`` is asked for, as a budget, a problem and a metric."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

from torch import Tensor

from adq_train.allocation.budget import Budget, Problem
from adq_train.allocation.problem import problem_of
from adq_train.artifacts import LayerInfo, LayerSensitivity, SensitivityTable
from adq_train.errors import UserError, did_you_mean
from adq_train.sensitivity.base import Conditions, ReadsAhead, SensitivityMetric
from adq_train.sensitivity.fisher import Fisher
from adq_train.sensitivity.from_file import FromTable
from adq_train.sensitivity.gradient import Gradient
from adq_train.sensitivity.hessian import Hessian
from adq_train.sensitivity.outputs import num_columns
from adq_train.sensitivity.perturbation import CRITERIA, LossRise, Perturbation
from adq_train.settings.schema import BitsConfig, BudgetConfig

log = logging.getLogger(__name__)

Sensitivity = SensitivityMetric | SensitivityTable | Mapping[str, Mapping[int, float]] | str

# What messages call by the names of settings, and the arguments of quantize() that these are.
ARGUMENTS = {
    "bits.candidates_per_layer": "candidates",
    "bits.candidates": "bit_widths",
    "bits.first_last": "first_last_bits",
    "bits.full_precision": "full_precision",
    "bits.pinned": "pinned",
    "bits.tied": "tied",
}
VALUES = {"=null": "=None", "=true": "=True", "=false": "=False"}


def in_python(message: str, more: Mapping[str, str]) -> str:
    """A message with arguments and their values where it has settings.

    Args:
        message: For a user of the command line.
        more: Settings that are arguments of this call, besides :data:`ARGUMENTS`.
    """
    names = {**ARGUMENTS, **more}
    settings, values = ("|".join(map(re.escape, x)) for x in (names, VALUES))
    return re.sub(
        rf"\b({settings})\b({values})?",
        lambda found: names[found[1]] + VALUES.get(found[2], ""),
        message,
    )


def limits(budget: Mapping[str, float | str], average_bits: float | None) -> BudgetConfig:
    """A budget by the names of its limits.

    Raises:
        UserError: A name or an amount is none, or the average is given twice.
    """
    known = [x.name for x in fields(Budget)]
    for name, amount in budget.items():
        if name not in known:
            hint = did_you_mean(name, known) or f"; it takes {', '.join(known)}"
            raise UserError(f"budget.{name}: there is no such limit{hint}")
        if not isinstance(amount, str) and not amount > 0:
            raise UserError(f"budget.{name}: must be more than 0, got {amount}")
    if average_bits is not None and not average_bits > 0:
        raise UserError(f"average_bits: must be more than 0, got {average_bits}")
    if average_bits is None:
        return BudgetConfig(**budget)
    if "average_weight_bits" in budget:
        raise UserError("average_bits: it is given in budget.average_weight_bits too; leave one")
    return BudgetConfig(**{**budget, "average_weight_bits": average_bits})


def widths(name: str, given: Sequence[int]) -> list[int]:
    """Candidates, ascending.

    Raises:
        UserError: One is no bit-width, or there are none.
    """
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise UserError(f"{name}: must be a list of some of 2 … 8, got {given!r}")
    found = list(given)
    if not found or not all(type(x) is int and 2 <= x <= 8 for x in found):
        raise UserError(f"{name}: must be one or more of 2 … 8, got {found}")
    return sorted(set(found))


def require(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Refuses an argument of another kind.

    Raises:
        UserError: Names the argument, what it must be, and what it got.
    """
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{name}: must be {what}, got {value!r}")


def problem(layers: Sequence[LayerInfo], bits: BitsConfig, budget: BudgetConfig) -> Problem:
    """What an allocator chooses from.

    Raises:
        UserError: A pattern matches no layer, or an amount is no share.
    """
    try:
        return problem_of(layers, bits, budget)
    except ValueError as error:
        raise UserError(f"budget: an amount {error}") from error


def table_of(values: Mapping[str, Mapping[int, float]], layers: Sequence[LayerInfo]) -> FromTable:
    """Ω of one's own, by layer and bit-width.

    Raises:
        UserError: A layer is missing.
    """
    rows = [
        LayerSensitivity(x.name, 0, 0, {int(b): float(v) for b, v in values[x.name].items()})
        for x in layers
        if x.name in values
    ]
    known = sorted({b for row in rows for b in row.sensitivity})
    return FromTable(SensitivityTable("given", tuple(known), tuple(rows)))


def metric(
    asked: Sensitivity | None,
    conditions: Conditions,
    problem: Problem,
    outputs: Tensor,
    one_tensor: bool,
) -> SensitivityMetric:
    """How Ω is measured.

    Args:
        asked: As ``quantize()`` takes it.
        conditions: Batches, and whether the network gives its loss.
        problem: What is to be chosen.
        outputs: (N, …) of the first batch.
        one_tensor: Whether these are a tensor of the network's own.

    Raises:
        UserError: The metric cannot serve here.
    """
    tensors = "both" if problem.tied else "separate"
    if asked is None:
        chosen = "loss" if conditions.gives_loss else _distance(conditions, outputs, one_tensor)
        asked = Perturbation(chosen, tensors)
    elif isinstance(asked, str):
        if asked not in CRITERIA:
            raise UserError(f"sensitivity: must be one of {', '.join(CRITERIA)}, got {asked!r}")
        asked = Perturbation(asked, tensors)
    elif isinstance(asked, SensitivityTable):
        asked = FromTable(asked)
    elif isinstance(asked, Mapping):
        asked = table_of(asked, problem.layers)
    if type(asked) is Perturbation and asked.criterion == "loss" and conditions.gives_loss:
        asked = LossRise(**vars(asked))
    own = type(asked).__module__.startswith("adq_train.")
    if conditions.gives_loss and own and not isinstance(asked, LossRise | Fisher | Hessian):
        raise UserError(f"loss: sensitivity={asked.name} does not use it; leave one of them out")
    if not conditions.gives_loss:
        _require_logits(asked, conditions, outputs, one_tensor)
    if isinstance(asked, ReadsAhead):
        asked.check(problem.layers, problem.candidates, not problem.tied)
    return asked


def _distance(conditions: Conditions, outputs: Tensor, one_tensor: bool) -> str:
    """By which distance outputs are compared where nobody says it."""
    why = None
    if not one_tensor:
        why = "several tensors count"
    elif num_columns(outputs) == 1:
        why = "one output for each input"
    elif any(len(y) and y.is_floating_point() for _, y in conditions.batches):
        why = "targets are no classes"
    if why:
        log.info("%s: Ω is the squared distance of the outputs", why)
    return "mse" if why else "kl"


def _require_logits(
    asked: SensitivityMetric, conditions: Conditions, outputs: Tensor, one_tensor: bool
) -> None:
    """Refuses a metric that takes outputs for logits where they are none.

    Raises:
        UserError: Says why.
    """
    by_labels = isinstance(asked, Fisher | Hessian)
    if isinstance(asked, Perturbation):
        by_labels = asked.criterion == "loss"
    elif not isinstance(asked, Gradient | Fisher | Hessian):
        return
    if isinstance(asked, Perturbation) and asked.criterion == "mse":
        return
    if not one_tensor:
        raise UserError(
            f"sensitivity: {asked.name} needs logits (N, classes, …), and several tensors count "
            "here; output=… picks one, sensitivity='mse' compares them all"
        )
    targets = conditions.batches[0][1]
    places = outputs.shape[:1] + outputs.shape[2:]
    classes = len(targets) and not targets.is_floating_point()
    if classes and outputs.ndim > 2 and targets.shape == outputs.shape[:-1] != places:
        raise UserError(
            f"output: logits {tuple(outputs.shape)} of targets {tuple(targets.shape)} have their "
            "classes on the last axis; output=lambda y: y.movedim(-1, 1) puts them on axis 1"
        )
    if by_labels and not (classes and targets.shape == places and outputs.ndim > 1):
        raise UserError(
            f"sensitivity: {asked.name} needs pairs of inputs and classes {tuple(places)}, whole "
            "numbers, as the outputs are logits "
            f"{tuple(outputs.shape)}; or give loss=… for another one"
        )
