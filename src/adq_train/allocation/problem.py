"""The settings of bits and budget as an allocation problem."""

from __future__ import annotations

from collections.abc import Sequence

from adq_train.allocation.budget import Problem, budget_from
from adq_train.allocation.patterns import by_layer, pinned_bits
from adq_train.artifacts import LayerInfo
from adq_train.settings.schema import BitsConfig, BudgetConfig


def problem_of(layers: Sequence[LayerInfo], bits: BitsConfig, budget: BudgetConfig) -> Problem:
    """What an allocator chooses from.

    Args:
        layers: All quantizable layers, in the order of execution.
        bits: Candidates and pins, by layer name or pattern.
        budget: Limits, in figures or as shares of the float model's.

    Raises:
        UserError: A pattern matches no layer, or a layer is matched twice.
        ValueError: A limit is a text that is no share.
    """
    own = by_layer("bits.candidates_per_layer", bits.candidates_per_layer or {}, layers)
    return Problem(
        tuple(layers),
        pinned_bits(layers, bits.first_last, bits.pinned or {}),
        tuple(bits.candidates),
        budget_from(vars(budget), layers),
        {name: tuple(widths) for name, widths in own.items()},
        bits.tied,
    )
