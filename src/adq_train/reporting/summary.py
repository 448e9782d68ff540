"""The summary at the end of a run, for a terminal and for a log file."""

from __future__ import annotations

import io
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
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
TITLE = "bold blue"
COLOURS = {2: "green", 3: "cyan", 4: "blue"}
CALIBRATED, BEGUN = "calibrated, untrained", "before QAT, from init_from"


@dataclass(frozen=True)
class Counts:
    """What a run's manifest counts of its model.

    Attributes:
        num_float_values: Parameters and statistics outside the quantized weights.
        num_edges: Values besides inputs of layers that are quantized too, each with a step.
        target: The name of the target that wants them.
    """

    num_float_values: int
    num_edges: int = 0
    target: str = ""


def kilobytes(count: float) -> str:
    """A size in kB or MB (10^3 and 10^6 bytes)."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def total_bytes(allocation: BitAllocation, counts: Counts) -> int:
    """Everything that inference needs: packed weights, tables and float values.

    Args:
        allocation: The bits. Weights are packed; their 2^b levels, the 2^b levels of inputs and
            the thresholds between these are tables in float32, as in a packed file.
        counts: Of the model.
    """
    tables: int = sum(2**x.weight_bits + 2 * 2**x.activation_bits - 1 for x in allocation.layers)
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
    trusted: Sequence[str] = (),
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
        trusted: The packages that the run was told to trust.
    """
    blank = Text()
    return Group(
        blank,
        Text(
            f"Layers: Ω at each width ({table.metric}); bits by {solved(allocation)}", style=TITLE
        ),
        layer_table(table, allocation),
        *(Text(one_line(x), style="bright_black") for x in unused_levels(levels)),
        blank,
        Text(
            f"Top-1 accuracy on {result.num_test_images:,} test images ({certainty(result)})",
            style=TITLE,
        ),
        accuracy_table(result, init_from),
        blank,
        Text("Size", style=TITLE),
        size_table(table, allocation, result, counts),
        blank,
        written(folder, trusted),
    )


def layer_table(table: SensitivityTable, allocation: BitAllocation) -> Table:
    """Sensitivities and bits, a row for each layer."""
    layers = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    # On a narrow terminal the bars give way, not the names.
    layers.add_column("layer", style="bold", min_width=max(len(x.name) for x in table.layers))
    layers.add_column("weights", justify="right")
    for width in table.bit_widths:
        layers.add_column(f"{width} bits", justify="right")
    layers.add_column("W/A", justify="right")
    layers.add_column("bits", no_wrap=True, overflow="crop")
    layers.add_column("packed", justify="right")
    chosen = allocation.bits()
    for layer in table.layers:
        bits = chosen[layer.name]
        layers.add_row(
            escape(one_line(layer.name)),
            f"{layer.num_weights:,}",
            *(f"{layer.sensitivity[b]:.1e}" for b in table.bit_widths),
            f"{bits.weight_bits}/{bits.activation_bits}",
            Text("■" * bits.weight_bits, style=COLOURS.get(bits.weight_bits, "bright_black")),
            kilobytes(packed_bytes(layer.num_weights, bits.weight_bits)),
        )
    return layers


def certainty(result: RunResult) -> str:
    """How far so many test images can tell the accuracy after QAT, in points."""
    share, count = result.qat_top1_percent / 100, result.num_test_images
    error = 100 * math.sqrt(max(share * (1 - share), 0) / count)
    # Where all answers are alike there is no such estimate; Wilson's interval has one.
    far = 100 * 1.96**2 / (count + 1.96**2)
    return f"standard error ±{error:.2f}" if error > 1e-3 else f"95 % interval: {far:.2f} points"


def accuracy_table(result: RunResult, init_from: bool) -> Table:
    """The accuracies side by side: float, before and after QAT."""
    accuracy = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("float", BEGUN if init_from else CALIBRATED, "after QAT", "QAT to float"):
        accuracy.add_column(heading, justify="right")
    accuracy.add_row(
        f"{result.fp_top1_percent:.2f} %",
        f"{result.ptq_top1_percent:.2f} %",
        Text(f"{result.qat_top1_percent:.2f} %", style="bold green"),
        f"{result.qat_top1_percent - result.fp_top1_percent:+.2f} points",
    )
    return accuracy


def size_table(
    table: SensitivityTable, allocation: BitAllocation, result: RunResult, counts: Counts
) -> Table:
    """Averages, bytes, bit operations, and the time of the stages that took some."""
    num_weights = sum(x.num_weights for x in table.layers)
    sizes = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    sizes.add_row(
        "average bits",
        f"{allocation.average_weight_bits:.2f} weights, "
        f"{allocation.average_activation_bits:.2f} activations "
        f"({allocation.average_weight_bits_all_layers:.2f} over all weights)",
    )
    for label, count, of in (
        ("packed weights", allocation.model_size_bytes, num_weights),
        ("whole model", total_bytes(allocation, counts), num_weights + counts.num_float_values),
    ):
        sizes.add_row(
            label,
            f"{kilobytes(count)}, {FLOAT_BYTES * of / count:.1f} times smaller than float32 "
            f"({kilobytes(FLOAT_BYTES * of)})",
        )
    if counts.num_edges:
        besides = f"{counts.num_edges} values besides the inputs of layers at 8 bits"
        sizes.add_row("target", f"{counts.target}, with {besides}")
    sizes.add_row("bit operations", f"{allocation.bops:.3g} per image")
    total = sum(result.seconds.values())
    long = [f"{name} {x:.1f}" for name, x in result.seconds.items() if x >= total / 50]
    sizes.add_row("time", f"{total:.1f} s ({', '.join(long)})")
    return sizes


def written(folder: Path, trusted: Sequence[str] = ()) -> Text:
    """Where the run is, and three commands to go on with."""
    place = shlex.quote(str(folder))
    text = Text(no_wrap=True, overflow="ignore")  # a path that is cut short cannot be copied
    text.append(f"written to  {folder}\npicture     {folder / 'plots' / 'summary.png'}\n")
    text.append(f"why these   {folder / 'allocation.txt'}\n\n")
    text.append("next:\n", style=TITLE)
    if (folder / "tensorboard").is_dir():
        text.append(f"  see how it trained  {typed('tensorboard')} --logdir {place}\n")
    text.append(f"  try other budgets   {typed('adq-pareto')} {place}\n")
    named = f" 'trusted_packages=[{','.join(trusted)}]'" if trusted else ""
    text.append(f"  make a small file   {typed('adq-export')} {place}{named}")
    return text


def typed(program: str) -> str:
    """What to type for a program of this environment, which need not be an active one."""
    beside = Path(sys.executable).with_name(program)
    if shutil.which(program) or not beside.exists():
        return program
    near = beside.is_relative_to(Path.cwd())
    return shlex.quote(str(beside.relative_to(Path.cwd()) if near else beside))


def show(content: RenderableType) -> None:
    """Prints to standard output, in colour on a terminal, and as plain text into the log."""
    # A pipe has no width; 80 columns would fold the table.
    Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True).print(content)
    text = io.StringIO()
    Console(file=text, width=120, soft_wrap=True).print(content)
    log.debug("%s", text.getvalue())
