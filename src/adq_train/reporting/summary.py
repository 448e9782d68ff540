"""The summary at the end of a run, for a terminal and for a log file."""

from __future__ import annotations

import io
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from adq_train.allocation.budget import packed_bytes
from adq_train.artifacts import BitAllocation, LevelCounts, RunResult, SensitivityTable
from adq_train.printable import one_line
from adq_train.reporting.allocation_text import solved

log = logging.getLogger(__name__)

FLOAT_BYTES = 4
CALIBRATED = ("after calibration", "no training yet")


@dataclass(frozen=True)
class Counts:
    """What a run's manifest counts of its model.

    Attributes:
        num_float_values: Parameters and statistics outside the quantized weights.
        num_edges: Values between layers that are quantized too, each with a step (target=int8).
    """

    num_float_values: int
    num_edges: int = 0


def kilobytes(count: float) -> str:
    """A size in kB or MB (10^3 and 10^6 bytes)."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def total_bytes(allocation: BitAllocation, counts: Counts) -> int:
    """Everything that inference needs: packed weights, their levels, thresholds, float values.

    Args:
        allocation: The bits; weights are packed, and 2^b levels and thresholds stay in float32.
        counts: Of the model.
    """
    tables: int = sum(2**x.weight_bits + 2**x.activation_bits for x in allocation.layers)
    values = tables + counts.num_float_values + counts.num_edges
    return allocation.model_size_bytes + FLOAT_BYTES * values


def unused_levels(levels: LevelCounts, most: int = 4) -> list[str]:
    """A line for each layer that does not use the levels that its bits promise.

    Args:
        levels: The counts of a run.
        most: At most so many layers are named.
    """
    lines = []
    for layer in levels.layers:
        uses = [
            f"{used} of {of} {what} levels"
            for used, of, what in (
                (layer.weight_levels_used, layer.weight_levels, "weight"),
                (layer.activation_levels_used, layer.activation_levels, "activation"),
            )
            if used < of
        ]
        if uses:
            lines.append(f"{layer.name} uses {' and '.join(uses)}")
    hidden = len(lines) - most
    return lines if hidden <= 0 else [*lines[:most], f"… and {hidden} more layers (levels.json)"]


def render(
    table: SensitivityTable,
    allocation: BitAllocation,
    levels: LevelCounts,
    result: RunResult,
    counts: Counts,
    folder: Path,
    init_from: bool = False,
) -> RenderableType:
    """Layers, accuracies, sizes and places.

    Args:
        table: Sensitivities.
        allocation: Bits.
        levels: Levels in use.
        result: Accuracies and times.
        counts: Of the model.
        folder: Where everything was written.
        init_from: Whether QAT began with the weights of another run.
    """
    places = Text(
        f"written to  {folder}\n"
        f"picture     {folder / 'plots' / 'summary.png'}\n"
        f"look at it  tensorboard --logdir {folder}",
        no_wrap=True,
        overflow="ignore",  # a path that is cut short cannot be copied
    )
    blank = Text()
    return Group(
        blank,
        Text(f"Layers (Ω: {table.metric}; bits: {solved(allocation)})", style="bold blue"),
        layer_table(table, allocation),
        *(Text(one_line(x)) for x in unused_levels(levels)),
        blank,
        Text("Top-1 accuracy on the test set", style="bold blue"),
        accuracy_table(result, init_from),
        blank,
        Text("Size", style="bold blue"),
        size_table(table, allocation, result, counts),
        blank,
        places,
    )


def layer_table(table: SensitivityTable, allocation: BitAllocation) -> Table:
    """Sensitivities and bits, a row for each layer."""
    layers = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    # On a narrow terminal the bars give way, not the names.
    layers.add_column("layer", style="bold", min_width=max(len(x.name) for x in table.layers))
    layers.add_column("weights", justify="right")
    for width in table.bit_widths:
        layers.add_column(f"Ω({width} bits)", justify="right")
    layers.add_column("bits W/A", justify="right")
    layers.add_column("", no_wrap=True, overflow="crop")
    layers.add_column("packed", justify="right")
    chosen = allocation.bits()
    for layer in table.layers:
        bits = chosen[layer.name]
        layers.add_row(
            escape(one_line(layer.name)),
            f"{layer.num_weights:,}",
            *(f"{layer.sensitivity[b]:.2e}" for b in table.bit_widths),
            f"{bits.weight_bits}/{bits.activation_bits}",
            Text("■" * bits.weight_bits, style="blue"),
            kilobytes(packed_bytes(layer.num_weights, bits.weight_bits)),
        )
    return layers


def accuracy_table(result: RunResult, init_from: bool) -> Table:
    """Accuracies before and after QAT, to as many digits as the test set can tell apart."""
    # Two digits mean something only where the test set can tell them apart.
    error = 100 * math.sqrt(
        max(result.qat_top1_percent, 1e-9) / 100 * (1 - min(result.qat_top1_percent, 100) / 100)
        / result.num_test_images
    )  # fmt: skip
    accuracy = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    begins = ("before QAT", "as init_from left it") if init_from else CALIBRATED
    for label, value, note in (
        ("float", result.fp_top1_percent, ""),
        (begins[0], result.ptq_top1_percent, begins[1]),
        (
            "after QAT",
            result.qat_top1_percent,
            f"{result.qat_top1_percent - result.fp_top1_percent:+.2f} points to float; "
            f"standard error ±{error:.2f} on {result.num_test_images:,} test images",
        ),
    ):
        accuracy.add_row(label, Text(f"{value:.2f} %", style="bold"), note)
    return accuracy


def size_table(
    table: SensitivityTable, allocation: BitAllocation, result: RunResult, counts: Counts
) -> Table:
    """Averages, bytes, bit operations, and the time of every stage."""
    num_weights = sum(x.num_weights for x in table.layers)
    whole = total_bytes(allocation, counts)
    float_whole = FLOAT_BYTES * (num_weights + counts.num_float_values)
    sizes = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    sizes.add_row(
        "average bits",
        f"{allocation.average_weight_bits:.2f} weights, "
        f"{allocation.average_activation_bits:.2f} activations "
        f"({allocation.average_weight_bits_all_layers:.2f} over all weights, with the first and "
        "last layer)",
    )
    sizes.add_row(
        "packed weights",
        f"{kilobytes(allocation.model_size_bytes)}, "
        f"{FLOAT_BYTES * num_weights / allocation.model_size_bytes:.1f} times smaller than the "
        f"{kilobytes(FLOAT_BYTES * num_weights)} of float32",
    )
    sizes.add_row(
        "whole model",
        f"{kilobytes(whole)} with levels, thresholds and the parts that stay float, "
        f"{float_whole / whole:.1f} times smaller than {kilobytes(float_whole)}",
    )
    if counts.num_edges:
        sizes.add_row(
            "target",
            f"int8: weight levels on int8 grids, {counts.num_edges} values between layers at "
            "8 bits; adq-export RUN_FOLDER format=qdq",
        )
    sizes.add_row("bit operations", f"{allocation.bops:.3g} per image")
    sizes.add_row("time", ", ".join(f"{k} {v:.1f} s" for k, v in result.seconds.items()))
    return sizes


def show(content: RenderableType) -> None:
    """Prints to standard output, in colour on a terminal, and as plain text into the log."""
    # A pipe has no width; 80 columns would fold the table.
    Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True).print(content)
    text = io.StringIO()
    Console(file=text, width=120, soft_wrap=True).print(content)
    log.debug("%s", text.getvalue())
