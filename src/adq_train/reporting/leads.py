"""What a reader wants first: ours beside the best rival, at equal bytes and equal input bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from adq_train.reporting.groups import Row, difference_of
from adq_train.reporting.names import short
from adq_train.reporting.statistics import Difference, judge

# The weight quantizers that this project is about, by the module of their class.
OURS = ("adq",)
# Rows count as equally large within this share of the bytes and so many bits of their inputs.
SAME_SHARE, SAME_BITS = 0.01, 0.05


@dataclass(frozen=True)
class Lead:
    """The best of ours and the best rival of one size, each chosen by its validation accuracy.

    Attributes:
        ours: A row with one of :data:`OURS`.
        rival: A row of another weight quantizer.
        among: How many rows of ours and of others there are at this size.
        difference: Ours minus the rival, on the test split; corrected over all leads.
    """

    ours: Row
    rival: Row
    among: tuple[int, int]
    difference: Difference | None


def leads(rows: Sequence[Row]) -> list[Lead]:
    """A lead for each size at which there are rows of both kinds, smallest first.

    Args:
        rows: Of one section.
    """
    done = sorted((row for row in rows if row.runs), key=_size)
    groups: list[list[Row]] = []
    for row in done:
        fitting = [group for group in groups if _alike(group[0], row)]
        if fitting:
            fitting[0].append(row)
        else:
            groups.append([row])
    pairs = []
    for group in groups:
        ours = [row for row in group if is_ours(row)]
        others = [row for row in group if not is_ours(row)]
        if ours and others:
            best = max(ours, key=_validation), max(others, key=_validation)
            pairs.append((*best, (len(ours), len(others))))
    judged = judge([difference_of(ours, rival) for ours, rival, _ in pairs])
    return [Lead(*pair, found) for pair, found in zip(pairs, judged, strict=True)]


def is_ours(row: Row) -> bool:
    """Whether a row's weights have an adaptive codebook."""
    return short(str(row.settings["weight_quantizer._target_"])) in OURS


def _alike(one: Row, other: Row) -> bool:
    near = abs(_size(other) / _size(one) - 1) <= SAME_SHARE
    inputs = one.mean("average_activation_bits") - other.mean("average_activation_bits")
    return near and abs(inputs) < SAME_BITS


def _size(row: Row) -> float:
    return row.mean("model_size_bytes")


def _validation(row: Row) -> float:
    """Mean validation accuracy; rows without QAT, which have none, come last."""
    values = [run.final_validation_top1_percent for run in row.runs]
    known = [value for value in values if value is not None]
    return fmean(known) if known else float("-inf")
