"""``allocation.txt``: the bits of each layer, and what other bits would change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from adq_train.allocation.budget import Problem
from adq_train.allocation.neighbours import Step, steps
from adq_train.artifacts import BitAllocation, SensitivityTable

HEADER = ("layer", "bits W/A", "other", "Ω rises by", "bytes", "bit operations", "in budget")
EXPLANATION = """\
Each line changes one layer to its next smaller or larger candidate and leaves the others alone.
A smaller width saves what the columns bytes and bit operations say, and Ω rises by the amount
given; a larger one lowers Ω and costs more. "in budget" says whether the budget has room for the
change: a "yes" beside a falling Ω means that the bits can be improved.
"""


def render(problem: Problem, table: SensitivityTable, allocation: BitAllocation) -> str:
    """The text of the file.

    Args:
        problem: What was chosen from.
        table: Sensitivities.
        allocation: What was chosen.
    """
    total = "not measured" if allocation.objective is None else f"{allocation.objective:.6g}"
    lines = [
        f"Bits by {solved(allocation)}; summed Ω ({table.metric}): {total}",
        *(
            f"budget.{name}: {getattr(allocation, name):.10g} of {limit:.10g}"
            for name, limit in allocation.budget.items()
        ),
        "",
        *_columns([HEADER, *_rows(list(steps(problem, table, allocation)))]),
        "",
        *(f"{name} is pinned to {bits} bits" for name, bits in problem.pinned.items()),
        "",
        EXPLANATION,
    ]
    return "\n".join(lines)


def solved(allocation: BitAllocation) -> str:
    """Who chose the bits, and what is proven of them: nothing more than the Ω can bear."""
    best = "optimal for these Ω" if allocation.optimal else "by these Ω"
    if allocation.caveat:
        return f"{allocation.allocator}, {best}, {allocation.caveat}"
    return f"{allocation.allocator}{', proven optimal' if allocation.optimal else ''}"


def _rows(changes: Sequence[Step]) -> list[tuple[str, ...]]:
    """One row for each change; a layer is named once."""
    rows: list[tuple[str, ...]] = []
    for _, group in groupby(changes, key=lambda x: x.layer):
        for index, x in enumerate(group):
            rows.append(
                (
                    "" if index else x.layer,
                    "" if index else f"{x.now.weights}/{x.now.activations}",
                    f"{x.then.weights}/{x.then.activations}",
                    "?" if x.loss is None else f"{x.loss:+.3e}",
                    f"{x.size_bytes:+,}",
                    f"{x.bops:+,}",
                    "yes" if x.within_budget else "no",
                )
            )
    return rows


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
