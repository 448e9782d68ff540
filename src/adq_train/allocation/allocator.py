"""What every allocator can do, and the account of its choice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict

from adq_train.allocation.budget import Bits, Problem, figures
from adq_train.artifacts import BitAllocation, LayerBits, SensitivityTable
from adq_train.errors import UserError
from adq_train.sensitivity.noise import within_noise


class Allocator(ABC):
    """Chooses bits for the layers that are not pinned."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The allocator's name in ``allocation.json``."""

    @abstractmethod
    def choose(self, problem: Problem, table: SensitivityTable) -> tuple[dict[str, Bits], bool]:
        """Bits of every mixed layer by name, and whether they are proven optimal.

        Raises:
            UserError: It cannot choose.
        """

    needs_table = True  # or no more of a table than the layers' names

    def check(self, problem: Problem) -> None:
        """Refuses what :meth:`choose` would refuse, as far as that shows before any training.

        Raises:
            UserError: It cannot choose.
        """
        problem.check()


class GivenAllocator(Allocator):
    """An allocator that looks at no sensitivity, so all that it would refuse shows at once."""

    needs_table = False

    @abstractmethod
    def bits_for(self, problem: Problem) -> dict[str, Bits]:
        """Bits of every mixed layer by name.

        Raises:
            UserError: They do not fit the layers, the pins or the budget.
        """

    def check(self, problem: Problem) -> None:
        """Refuses whatever :meth:`choose` would refuse.

        Raises:
            UserError: Says why.
        """
        super().check(problem)
        self.bits_for(problem)

    def choose(self, problem: Problem, table: SensitivityTable) -> tuple[dict[str, Bits], bool]:
        """Bits of every mixed layer by name; never proven optimal.

        Raises:
            UserError: They do not fit.
        """
        return self.bits_for(problem), False


def omega(problem: Problem, table: SensitivityTable) -> dict[str, dict[Bits, float]]:
    """Ω of every option of every mixed layer: the effect of its weights and of its input.

    A table with ``activation_sensitivity`` gives both apart, and they add up; one without holds
    the effect of both at the same bit-width.

    Args:
        problem: Layers and their options.
        table: Sensitivities of at least the mixed layers.

    Raises:
        UserError: The table does not say what an option costs.
    """
    rows = {x.name: x for x in table.layers}
    values: dict[str, dict[Bits, float]] = {}
    for layer in problem.mixed:
        row = rows.get(layer.name)
        if row is None:
            raise UserError(
                f"sensitivity: {table.metric} says nothing about {layer.name}; measure it anew"
            )
        if row.activation_sensitivity is None and not problem.tied:
            raise UserError(not_apart(table.metric))
        missing = set(problem.widths(layer)) - set(row.sensitivity)
        if missing:
            raise UserError(
                f"sensitivity: {table.metric} of {layer.name} was not measured at {min(missing)} "
                f"bits, only at {sorted(row.sensitivity)}; choose among these"
            )
        inputs = row.activation_sensitivity or dict.fromkeys(row.sensitivity, 0.0)
        values[layer.name] = {
            bits: row.sensitivity[bits.weights] + inputs[bits.activations]
            for bits in problem.options(layer)
        }
    return values


def require_costs(problem: Problem, table: SensitivityTable) -> None:
    """Refuses a table by which nothing can be chosen, as nothing costs anything.

    Raises:
        UserError: Names the metric, and what to use instead.
    """
    values = omega(problem, table).values()
    if any(len(x) > 1 for x in values) and not any(cost for x in values for cost in x.values()):
        raise UserError(
            f"sensitivity: every Ω of {table.metric} is 0, so no bits can be chosen by it; the "
            "float model's outputs may be constant, or the metric blind to them: check the model, "
            "take another criterion or metric (sensitivity.criterion=mse, sensitivity=mse), or "
            "allocator=uniform, which needs none"
        )


def not_apart(metric: str) -> str:
    """What to say where a metric does not serve bits that are chosen apart."""
    return (
        f"bits.tied: false needs the effects of weights and of activations apart, and {metric} "
        "does not tell them apart; set sensitivity.tensors=separate with "
        "sensitivity=perturbation or gradient, or bits.tied=true"
    )


def caveat(problem: Problem, table: SensitivityTable) -> str | None:
    """Why the best bits by a table may be no better than others, or None.

    Args:
        problem: Layers and their options.
        table: Sensitivities of all options.
    """
    rows = {x.name: x for x in table.layers}
    choices = [(rows[x.name], problem.widths(x)) for x in problem.mixed]
    is_open = any(len(widths) > 1 for _, widths in choices)
    if is_open and not table.may_rise and within_noise(choices):
        return "which are within noise"
    return f"but {table.caveat}" if table.caveat else None


def objective(problem: Problem, table: SensitivityTable, bits: Mapping[str, Bits]) -> float | None:
    """Σ_l Ω[l, bits_l] over the mixed layers; None where the table does not hold these bits."""
    rows = {x.name: x for x in table.layers}
    total = 0.0
    for layer in problem.mixed:
        row, (weights, activations) = rows[layer.name], bits[layer.name]
        inputs = row.activation_sensitivity
        if weights not in row.sensitivity or activations not in (inputs or row.sensitivity):
            return None
        if inputs is None and weights != activations:
            return None
        total += row.sensitivity[weights] + (inputs[activations] if inputs else 0.0)
    return total


def allocate(allocator: Allocator, problem: Problem, table: SensitivityTable) -> BitAllocation:
    """Lets an allocator choose, and accounts for what its choice costs.

    Args:
        allocator: Who chooses.
        problem: Layers, candidates and budget.
        table: Sensitivities of at least the mixed layers.

    Raises:
        UserError: No allocation meets the budget, or the table says nothing to choose by.
    """
    problem.check()
    if allocator.needs_table:
        require_costs(problem, table)
    chosen, optimal = allocator.choose(problem, table)
    bits = {**chosen, **problem.pinned_bits()}
    broken = problem.broken(bits)
    assert not broken, f"{allocator.name} broke {broken}"
    return BitAllocation(
        allocator=allocator.name,
        budget=problem.budget.limits(),
        layers=tuple(LayerBits(x.name, *bits[x.name]) for x in problem.layers),
        **asdict(figures(problem.layers, bits, problem.pinned)),
        objective=objective(problem, table, bits),
        optimal=optimal,
        caveat=caveat(problem, table) if allocator.needs_table else None,
    )
