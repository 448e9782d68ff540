"""The trade-off as a picture and as a table; without torch, so that it answers at once."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import fields

from matplotlib.figure import Figure
from rich.table import Table

from adq_train.allocation.budget import Figures
from adq_train.artifacts import BitAllocation

COLUMNS = (*(x.name for x in fields(Figures)), "objective", "optimal")


def to_csv(allocations: Sequence[BitAllocation]) -> str:
    """One row per allocation; ``bits`` holds ``weights/input`` of every layer, in order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("allocator", *COLUMNS, "bits"))
    for x in allocations:
        bits = " ".join(f"{y.weight_bits}/{y.activation_bits}" for y in x.layers)
        writer.writerow((x.allocator, *(getattr(x, name) for name in COLUMNS), bits))
    return text.getvalue()


def to_table(allocations: Sequence[BitAllocation]) -> Table:
    """The same for a terminal, without the bits of each layer."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("allocator")
    for name in ("bits W", "bits A", "kB", "bit operations", "summed Ω", "proven"):
        table.add_column(name, justify="right")
    for x in allocations:
        table.add_row(
            x.allocator,
            f"{x.average_weight_bits:.3f}",
            "" if math.isnan(x.average_activation_bits) else f"{x.average_activation_bits:.3f}",
            f"{x.model_size_bytes / 1e3:.1f}",
            f"{x.bops:.4g}",
            f"{x.objective:.4g}",
            "yes" if x.optimal else "",
        )
    return table


def draw(best: Sequence[BitAllocation], uniform: Sequence[BitAllocation], metric: str) -> Figure:
    """Predicted loss against average bits and against size, with the uniform ones marked."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name, unit, label in (
        (left, "average_weight_bits", 1.0, "average bits of the weights whose bits are chosen"),
        (right, "model_size_bytes", 1e3, "packed weights, kB"),
    ):
        for some, style, what in ((best, "o-", "chosen"), (uniform, "s", "uniform")):
            values = [getattr(x, name) / unit for x in some]
            axes.plot(values, [x.objective for x in some], style, markersize=4, label=what)
        for x in uniform:
            text = f"{x.average_weight_bits:.0f} bits"
            axes.annotate(
                text, (getattr(x, name) / unit, x.objective or 0.0), fontsize=7,
                xytext=(4, 4), textcoords="offset points",
            )  # fmt: skip
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    if all((x.objective or 0.0) > 0 for x in (*best, *uniform)):
        left.set_yscale("log")
    left.set_ylabel(f"summed Ω ({metric})")
    left.legend(frameon=False)
    return figure
