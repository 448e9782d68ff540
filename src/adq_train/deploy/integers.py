"""Tables on integer grids: levels as small integers times a step, staircases as thresholds.

What counts and multiplies integers alone takes a network in this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adq_train.deploy.layer_tables import LayerTables, Staircase
from adq_train.deploy.model import TableModel

# Two float32 numbers that are integers times one step are that up to a few roundings.
EXACT = 1e-6
# The largest integer that is tried; levels that are on no grid go to eight bits, with or without a
# sign: to the best of the grids that reach further than seven would.
LARGEST = 255
EIGHT_BITS = {True: (64, 127), False: (128, 255)}


@dataclass(frozen=True)
class Grid:
    """Levels as integers times a step.

    Attributes:
        integers: (K,) int64.
        step: Positive.
        error: The largest distance of a level to its place, as a share of the largest level; 0
            where the levels are on the grid.
    """

    integers: Tensor
    step: float
    error: float

    def levels(self) -> Tensor:
        """(K,) float32."""
        return (self.integers * self.step).float()


def integer_grid(levels: Tensor) -> Grid:
    """The smallest integers that some levels are a multiple of, or else the nearest 8-bit ones.

    Args:
        levels: (K,) float32, of either sign; 0 is always on the grid.
    """
    values = levels.double()
    largest = float(values.abs().max())
    if largest == 0:
        return Grid(torch.zeros_like(levels, dtype=torch.int64), 1.0, 0.0)
    reaches = torch.arange(1, LARGEST + 1, dtype=torch.float64)
    places = values / largest * reaches[:, None]
    errors = (places - places.round()).abs().amax(1) / reaches
    exact = (errors <= EXACT).nonzero().flatten()
    low, high = EIGHT_BITS[bool(values.min() < 0)]
    best = int(exact[0]) if len(exact) else low - 1 + int(errors[low - 1 : high].argmin())
    error = 0.0 if len(exact) else float(errors[best])
    return Grid(places[best].round().long(), largest / float(reaches[best]), error)


@dataclass(frozen=True)
class Thresholds:
    """A staircase that counts: ``(first + number of thresholds that x reaches) * step``.

    Attributes:
        values: Ascending float32 numbers, one of them several times where a level is skipped. A
            value reaches those that are not larger than it.
        first: The integer below all of them.
        step: Of a count.
    """

    values: Tensor
    first: int
    step: float

    @property
    def last(self) -> int:
        """The integer above all of them."""
        return self.first + len(self.values)


def counted(stairs: Staircase, behind_relu: bool = False) -> Thresholds:
    """A staircase as thresholds that are reached, instead of passed.

    A step of a staircase belongs to the values above its threshold; those reach the next larger
    float32 number, and no others do.

    Args:
        stairs: Levels on any grid; see :func:`integer_grid`.
        behind_relu: Whether the staircase shall do what a ReLU before it does as well.
    """
    grid = integer_grid(stairs.levels)
    reached = torch.nextafter(stairs.thresholds, torch.full_like(stairs.thresholds, torch.inf))
    always = stairs.thresholds.isneginf() | (behind_relu & (stairs.thresholds < 0))
    never = reached.isposinf()
    rises = grid.integers.diff()
    values = reached.repeat_interleave(torch.where(always | never, 0, rises))
    return Thresholds(values, int(grid.integers[0] + rises[always].sum()), grid.step)


def on_integers(model: TableModel) -> TableModel:
    """The same network with every level of its layers at a place of its grid."""
    layers = {
        name: LayerTables(
            replace(x.weight, codebook=_placed(x.weight.codebook)),
            replace(x.input, levels=_placed(x.input.levels)),
        )
        for name, x in model.layers.items()
    }
    return replace(model, layers=layers)


def _placed(levels: Tensor) -> Tensor:
    """The places of levels on their grid; themselves where they are on it, up to rounding."""
    grid = integer_grid(levels)
    return grid.levels() if grid.error else levels


def moved(layers: Mapping[str, LayerTables]) -> tuple[str, ...]:
    """What :func:`on_integers` changes, in a line each; nothing where all levels are on grids."""
    lines = []
    cures = {
        "weight": "train with target=int8 for levels that are",
        "input": "the levels of n2uq, lsq, pact and dorefa are",
    }
    for what, cure in cures.items():
        errors = {}
        for name, tables in layers.items():
            levels = tables.weight.codebook if what == "weight" else tables.input.levels
            errors[name] = integer_grid(levels).error
        off = [name for name, error in errors.items() if error]
        if off:
            some = ", ".join(off[:3]) + (", …" if len(off) > 3 else "")
            lines.append(
                f"the {what} levels of {len(off)} layers ({some}) are no integers times a step; "
                f"they are rounded to integers of eight bits, by up to {max(errors.values()):.2%} "
                f"of the largest; {cure}"
            )
    return tuple(lines)
