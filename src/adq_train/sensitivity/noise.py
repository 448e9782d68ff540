"""How far sensitivities can be told from noise, and from each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from adq_train.artifacts import LayerSensitivity, SensitivityTable

# A difference is noise up to this many standard errors.
NOISE = 2.0
MOST_NAMES = 3

Values = Mapping[int, float]
Found = tuple[float, float | None]  # a mean over images, and its standard error


def by_bits(found: Mapping[int, Found]) -> tuple[dict[int, float], dict[int, float] | None]:
    """Means and standard errors by bit-width."""
    errors = {bits: error for bits, (_, error) in found.items() if error is not None}
    return {bits: mean for bits, (mean, _) in found.items()}, errors or None


def falling(values: Sequence[float]) -> list[float]:
    """The nearest numbers, in squares, that never rise and are never negative.

    Isotonic regression: neighbours that rise are replaced by their mean until none does.

    Args:
        values: By rising bit-width.
    """
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and _mean(blocks[-1]) > _mean(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    return [max(_mean(block), 0.0) for block in blocks for _ in block]


def _mean(block: Sequence[float]) -> float:
    return math.fsum(block) / len(block)


def settle(row: LayerSensitivity) -> LayerSensitivity:
    """A layer whose Ω falls with more bits and is not negative, where its errors allow that.

    More bits cannot cost more, so where they seem to by chance, the values are evened out. They
    stay as measured where one would have to move by more than ``NOISE`` standard errors, or where
    these are not known. What was measured is kept beside the new values.
    """
    values, measured = _settled(row.sensitivity, row.standard_error)
    inputs, inputs_measured = _settled(row.activation_sensitivity, row.activation_standard_error)
    assert values is not None
    return replace(
        row,
        sensitivity=values,
        activation_sensitivity=inputs,
        measured=measured or row.measured,
        activation_measured=inputs_measured or row.activation_measured,
    )


def _settled(
    values: dict[int, float] | None, errors: Values | None
) -> tuple[dict[int, float] | None, dict[int, float] | None]:
    """Values for allocators, and what was measured where that differs."""
    if values is None or errors is None:
        return values, None
    widths = sorted(values)
    fitted = dict(zip(widths, falling([values[b] for b in widths]), strict=True))
    near = all(abs(fitted[b] - values[b]) <= NOISE * errors[b] for b in widths)
    return ({b: fitted[b] for b in values}, values) if near and fitted != values else (values, None)


def oddities(table: SensitivityTable) -> str | None:
    """One sentence about the values that are negative or rise with more bits, or None."""
    if table.may_rise:
        return None
    found = [
        f"{'' if what == 'layer' else what + ' '}{row.name} ({odd})"
        for row in table.layers
        for what, values in row.by_tensors()
        if (odd := _odd(values))
    ]
    if not found:
        return None
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return (
        f"sensitivity: {table.metric} is negative or rises with more bits beyond its standard "
        f"error, and is kept as it is, for {'; '.join(found[:MOST_NAMES])}{more}"
    )


def _odd(values: Values) -> str | None:
    """The first negative value of a layer, or the first that is larger than at fewer bits."""
    widths = sorted(values)
    for bits in widths:
        if values[bits] < 0:
            return f"{values[bits]:.3g} at {bits} bits"
    for few, many in pairwise(widths):
        if values[many] > values[few]:
            return f"{values[few]:.3g} at {few} bits, {values[many]:.3g} at {many}"
    return None


def evened_out(table: SensitivityTable) -> int:
    """The number of layers of which some values were made to fall."""
    return sum(x.measured is not None or x.activation_measured is not None for x in table.layers)


def within_noise(choices: Iterable[tuple[LayerSensitivity, Sequence[int]]]) -> bool:
    """Whether no more is gained from the fewest to the most bits of all layers than by chance.

    The gain is the sum of Ω's falls; its standard error follows from those of the values, which
    are taken for independent. Values without one count as exact.

    Args:
        choices: Layers, and the bit-widths that each may get, rising.
    """
    gain, variance = 0.0, 0.0
    for row, widths in choices:
        for values, errors in (
            (row.sensitivity, row.standard_error),
            (row.activation_sensitivity, row.activation_standard_error),
        ):
            few, many = widths[0], widths[-1]
            if values is not None and few != many:
                gain += values[few] - values[many]
                variance += sum((errors or {}).get(b, 0.0) ** 2 for b in (few, many))
    return gain <= NOISE * math.sqrt(variance)
