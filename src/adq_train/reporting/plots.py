"""Pictures of a run, as matplotlib figures that belong to no window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from adq_train.artifacts import BitAllocation, RunResult, SensitivityTable

if TYPE_CHECKING:  # adq-report draws without torch
    from torch import nn

    from adq_train.quantization.layers import QuantLayer

BLUE, ORANGE, GREY, RED = "#2b6cb0", "#dd6b20", "#a0aec0", "#c53030"
MOST_PANELS = 24


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def draw_sensitivity(axes: Axes, table: SensitivityTable) -> None:
    """A heat map, layers by bit-widths, on a logarithmic colour scale."""
    values = np.array([[x.sensitivity[b] for b in table.bit_widths] for x in table.layers])
    positive = values[values > 0]
    norm = LogNorm(positive.min(), positive.max()) if len(positive) else None
    # Zero and negative values have no logarithm: they stay white and keep their number.
    shown = np.ma.masked_less_equal(values.T, 0)
    image = axes.imshow(shown, aspect="auto", cmap="YlOrRd", norm=norm)
    axes.set_yticks(range(len(table.bit_widths)), [f"{b} bits" for b in table.bit_widths])
    axes.set_xticks(range(len(table.layers)), [x.name for x in table.layers], rotation=90)
    axes.tick_params(labelsize=8)
    if len(table.layers) <= MOST_PANELS:
        middle = np.sqrt(positive.min() * positive.max()) if len(positive) else 0
        for (row, column), value in np.ndenumerate(values.T):
            color = "white" if value > middle * 3 else "black"
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=6,
                      color=color)  # fmt: skip
    # Plain numbers: the powers of ten of a logarithmic scale would need mathematical text.
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, format="%g")
    bar.ax.yaxis.set_minor_formatter("")
    axes.set_title(f"Sensitivity ({table.metric})", loc="left", fontsize=10)


def draw_allocation(axes: Axes, allocation: BitAllocation) -> None:
    """Bars: the bits of each layer's weights, with the average as a line.

    A dash marks the bits of a layer's input where they differ.
    """
    bits = [x.weight_bits for x in allocation.layers]
    axes.bar(range(len(bits)), bits, color=BLUE, width=0.75)
    for position, value in enumerate(bits):
        axes.text(position, value + 0.1, str(value), ha="center", fontsize=7)
    inputs = [(i, x.activation_bits) for i, x in enumerate(allocation.layers)
              if x.activation_bits != x.weight_bits]  # fmt: skip
    if inputs:
        places, widths = zip(*inputs, strict=True)
        axes.plot(places, widths, "_", color=RED, markersize=9, label="input")
        axes.legend(fontsize=7, frameon=False)
        bits = [*bits, *widths]
    average = allocation.average_weight_bits
    axes.axhline(average, color=ORANGE, linewidth=1.2, linestyle="--")
    names = [x.name for x in allocation.layers]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_ylim(0, max(bits) + 1)
    axes.set_ylabel("bits")
    axes.tick_params(labelsize=8)
    axes.set_title(
        f"Bits ({allocation.allocator}): {average:.2f} on average, without the pinned ends",
        loc="left",
        fontsize=10,
    )
    _tidy(axes)


def draw_layer(axes: Axes, name: str, layer: QuantLayer) -> None:
    """A histogram of one layer's weights with its levels drawn on it."""
    from adq_train.quantization.layer_weights import used_weight

    weight = used_weight(layer).detach()
    scale = layer.weight_quantizer.output_scale(weight)
    weight = weight / scale.masked_fill(scale <= 0, 1.0)  # in the units of the levels
    counts, edges = np.histogram(weight.flatten().cpu().numpy(), bins=60)
    axes.stairs(counts, edges, fill=True, color=GREY)
    levels = layer.weight_quantizer.levels().detach().cpu().numpy()
    # One artist for all levels: a line each would take seconds for the 255 of eight bits.
    across = axes.get_xaxis_transform()
    width = 0.9 if len(levels) <= 16 else 0.15
    axes.vlines(levels, 0, 1, color=RED, linewidth=width, transform=across)
    axes.set_title(f"{name}, {layer.weight_quantizer.bit_width} bits", fontsize=7)
    axes.tick_params(labelsize=6)
    axes.set_yticks([])
    _tidy(axes)


def draw_training(axes: Axes, records: Sequence[dict[str, Any]], result: RunResult) -> None:
    """Validation accuracy of float training and QAT, epoch after epoch, with the test figures."""
    first = 1
    for stage, color, label in (("pretrain", GREY, "float training"), ("qat", BLUE, "QAT")):
        values = [x["validation_top1_percent"] for x in records if x["stage"] == stage]
        if values:
            epochs = range(first, first + len(values))
            axes.plot(epochs, values, color=color, label=f"{label} (validation)")
            first += len(values)
    for value, color, label in (
        (result.fp_top1_percent, GREY, "float"),
        (result.ptq_top1_percent, RED, "before QAT"),
        (result.qat_top1_percent, BLUE, "after QAT"),
    ):
        axes.axhline(value, color=color, linestyle=":", label=f"{label} (test): {value:.2f} %")
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1, %")
    axes.legend(fontsize=7, frameon=False, loc="center right")
    axes.set_title("Accuracy", loc="left", fontsize=10)
    _tidy(axes)


def codebooks(records: Sequence[dict[str, Any]]) -> Figure:
    """Every layer's levels, epoch after epoch of QAT (layers with many levels are not recorded)."""
    history = [x for x in records if x.get("codebooks")]
    names = list(history[0]["codebooks"]) if history else []
    epochs = [x["epoch"] for x in history]
    figure, panels = _panels(names)
    for axes, name in zip(panels, names, strict=False):
        values = [x["codebooks"][name] for x in history]
        axes.plot(epochs, values, ".-" if len(epochs) == 1 else "-", color=BLUE, linewidth=0.9)
        axes.set_title(name, fontsize=7)
        axes.tick_params(labelsize=6)
        _tidy(axes)
    return figure


def sensitivity(table: SensitivityTable) -> Figure:
    """The heat map alone."""
    figure = Figure(figsize=(max(6, 0.45 * len(table.layers) + 2), 3.2), layout="constrained")
    draw_sensitivity(figure.subplots(), table)
    return figure


def draw_sizes(axes: Axes, table: SensitivityTable) -> None:
    """Bars: each layer's share of all weights and of all multiply-accumulates."""
    for shift, color, what, values in (
        (-0.2, BLUE, "weights", [x.num_weights for x in table.layers]),
        (0.2, GREY, "MACs", [x.macs for x in table.layers]),
    ):
        places = [i + shift for i in range(len(values))]
        shares = [100 * value / sum(values) for value in values]
        axes.bar(places, shares, color=color, width=0.4, label=f"of {sum(values):,} {what}")
    axes.set_ylabel("%")
    axes.tick_params(labelsize=8, labelbottom=False)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("Shares of each layer", loc="left", fontsize=10)
    _tidy(axes)


def allocation(bits: BitAllocation, table: SensitivityTable) -> Figure:
    """The bars, below what share each layer has of the weights and of the MACs."""
    width = max(6, 0.45 * len(bits.layers) + 1)
    figure = Figure(figsize=(width, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.4))
    draw_sizes(upper, table)
    draw_allocation(lower, bits)
    return figure


def weights_and_levels(model: nn.Module) -> Figure:
    """Every layer's weights with its levels (evenly chosen layers where there are many)."""
    from adq_train.quantization.prepare import quantized_layers

    layers = quantized_layers(model)
    names = list(layers)
    if len(names) > MOST_PANELS:
        chosen = np.linspace(0, len(names) - 1, MOST_PANELS).round().astype(int)
        names = [names[i] for i in chosen]
    figure, panels = _panels(names)
    for axes, name in zip(panels, names, strict=False):
        draw_layer(axes, name, layers[name])
    return figure


def _panels(names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with a small panel for each name, four in a row."""
    columns = 4
    rows = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(10, 1.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure, panels


def training(records: Sequence[dict[str, Any]], result: RunResult) -> Figure:
    """The accuracy curves alone."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    draw_training(figure.subplots(), records, result)
    return figure


def summary(
    table: SensitivityTable,
    bits: BitAllocation,
    records: Sequence[dict[str, Any]],
    result: RunResult,
    model: nn.Module,
) -> Figure:
    """One picture of the whole line: sensitivity, allocation, accuracy, and two layers' levels."""
    from adq_train.quantization.prepare import quantized_layers

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    upper, lower = halves
    left, right = upper.add_subplot(1, 2, 1), upper.add_subplot(1, 2, 2)
    draw_sensitivity(left, table)
    draw_allocation(right, bits)
    below_left, below_right = lower.subfigures(1, 2, width_ratios=(1.1, 1))
    draw_training(below_left.subplots(), records, result)
    layers = quantized_layers(model)
    by_bits = sorted(layers.items(), key=lambda item: item[1].weight_quantizer.bit_width)
    # The layers with the fewest bits and, before the 8-bit ends, with the most.
    mixed = [x for x in by_bits if x[1].weight_quantizer.bit_width < 8] or by_bits
    grid = below_right.subplots(2, 1)
    for axes, (name, layer) in zip(grid, (mixed[0], mixed[-1]), strict=True):
        draw_layer(axes, f"Weights and levels of {name}", layer)
    return figure
