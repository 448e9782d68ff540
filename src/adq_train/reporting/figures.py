"""Pictures across runs, and how a picture gets into a page."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adq_train.reporting.groups import Row, Section
from adq_train.reporting.names import told_apart
from adq_train.reporting.statistics import Summary, summarize

GREY = "#718096"
MARKERS = "osD^v<>PX*hd"
LINE, MOST_LINES = 52, 3
APART = 0.009  # of a panel's width, between the points of equal cost


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Drawing for a page: names taken literally, and the same bytes for the same runs."""
    with mpl.rc_context({"text.parse_math": False, "svg.hashsalt": "adq", "font.size": 9}):
        yield


def data_uri(figure: Figure) -> str:
    """The figure as SVG on a transparent ground, in the text of a link."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def png_files(section: Section) -> dict[str, Figure]:
    """A section's pictures by the names of their files: for a text that cannot hold them."""
    rows = [row for row in section.rows if row.runs]
    if not rows:
        return {}
    name = re.sub(r"[^\w.]+", "-", f"{section.data}-{section.model}")
    made = {
        f"{name}-accuracy.png": accuracy_and_cost(rows),
        f"{name}-bars.png": bars(rows, section.references_in_use()),
        f"{name}-bits.png": bits(rows),
    }
    learning = curves(rows)
    return {**made, f"{name}-curves.png": learning} if learning else made


def label(name: str) -> str:
    """A name in a few lines; what is longer ends in an ellipsis."""
    lines = textwrap.wrap(name, LINE)
    return "\n".join(lines[:MOST_LINES]) + ("…" if len(lines) > MOST_LINES else "")


def height(names: Iterable[str]) -> float:
    """Inches that the labels of all names need, one above the other."""
    return sum(0.18 + 0.15 * (1 + label(name).count("\n")) for name in names)


def methods(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The rows that differ in nothing but their budgets, by the least that tells them apart."""
    found: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(rows):
        words = [word for word in row.name.split() if not word.startswith("budget.")]
        found.setdefault(tuple(words), []).append(index)
    return dict(zip(told_apart(found), found.values(), strict=True))


def draw_float(panel: Axes, rows: Sequence[Row], colors: Sequence[Any]) -> None:
    """A line for the float model, or one for each row where the rows' models are not the same."""
    by_seed: dict[int, set[float]] = {}
    for row in rows:
        for run in row.runs:
            if run.result:
                by_seed.setdefault(run.seed, set()).add(run.result.fp_top1_percent)
    if all(len(values) == 1 for values in by_seed.values()):
        mean = fmean(value for values in by_seed.values() for value in values)
        panel.axhline(mean, color=GREY, linestyle="--", label=f"float: {mean:.2f} %")
        return
    for index, (row, color) in enumerate(zip(rows, colors, strict=True)):
        label = "float, in the colour of each run" if index == 0 else None
        mean = row.mean("fp_top1_percent")
        panel.axhline(mean, color=color, linestyle="--", linewidth=0.9, label=label)


def side_by_side(values: Sequence[float]) -> list[float]:
    """The values, equal ones a little apart, so that their points do not hide each other.

    Where all are equal, they are spread over a tenth of the value.
    """
    span = max(values) - min(values)
    step = APART * span if span else 0.1 * max(values) / len(values)
    moved = []
    for index, value in enumerate(values):
        before = sum(other == value for other in values[:index])
        moved.append(value + step * (before - (values.count(value) - 1) / 2))
    return moved


def summaries(rows: Sequence[Row], name: str) -> list[Summary]:
    """What each row of finished runs has for a field."""
    found = [row.summary(name) for row in rows]
    assert all(found)
    return [value for value in found if value]


def accuracy_and_cost(rows: Sequence[Row]) -> Figure:
    """Top-1 against average bits and against size, a point with its spread for each row.

    Rows of one method at several budgets share a colour and are joined.
    """
    series = methods(rows)
    figure = Figure(figsize=(10, 4.2 + height(series) / 2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    palette = mpl.colormaps["tab10" if len(series) <= 10 else "tab20"]
    colors = {
        index: palette(number % palette.N)
        for number, members in enumerate(series.values())
        for index in members
    }
    for panel, cost, unit in zip(
        panels,
        ("average_weight_bits", "model_size_bytes"),
        ("average bits of the weights", "packed weights, kB"),
        strict=True,
    ):
        scale = 1e3 if cost == "model_size_bytes" else 1
        costs, tops = summaries(rows, cost), summaries(rows, "qat_top1_percent")
        means = [value.mean / scale for value in costs]
        at = side_by_side(means)
        for number, (name, members) in enumerate(series.items()):
            panel.errorbar(
                [at[index] for index in members],
                [tops[index].mean for index in members],
                xerr=[(costs[index].std or 0) / scale for index in members],
                yerr=[tops[index].std or 0 for index in members],
                marker=MARKERS[number % len(MARKERS)],
                color=colors[members[0]],
                linewidth=0.8,
                capsize=3,
                label=label(name),
            )
        draw_float(panel, rows, [colors[index] for index in range(len(rows))])
        if len(set(means)) == 1:  # positions between the points would mean nothing
            panel.set_xticks(means[:1], [f"{round(means[0], 2):,}"])
        panel.set_xlabel(unit if at == means else f"{unit} (equal ones drawn side by side)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("top-1 after QAT, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", frameon=False, ncols=2)
    return figure


def curves(rows: Sequence[Row]) -> Figure | None:
    """Loss and validation accuracy by epoch of QAT: the mean of each row's seeds, with a band.

    The band is ± one standard deviation, where there are two seeds or more. None where no row was
    trained.
    """
    palette = mpl.colormaps["tab10" if len(rows) <= 10 else "tab20"]
    figure = Figure(figsize=(10, 3.4 + height(row.name for row in rows) / 2), layout="constrained")
    panels = figure.subplots(1, 2)
    drawn = False
    for panel, name, what in zip(
        panels,
        ("train_loss", "validation_top1_percent"),
        ("training loss", "top-1 on validation images, %"),
        strict=True,
    ):
        for number, row in enumerate(rows):
            known = [curve for run in row.runs if (curve := run.curve(name))]
            epochs = sorted(set.intersection(*map(set, known))) if known else []
            if not epochs:
                continue
            drawn = True
            values = np.array([[curve[epoch] for epoch in epochs] for curve in known])
            mean, color = values.mean(0), palette(number % palette.N)
            style = ".-" if len(epochs) == 1 else "-"
            panel.plot(epochs, mean, style, color=color, linewidth=1.2, label=label(row.name))
            if len(known) > 1:
                spread = values.std(0, ddof=1)
                panel.fill_between(
                    epochs, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0
                )
        panel.set_xlabel("epoch of QAT")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.set_ylabel(what)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", frameon=False, ncols=2)
    return figure if drawn else None


def bars(rows: Sequence[Row], references: Collection[str]) -> Figure:
    """Top-1 after QAT minus that of the same seed's float model: bars from zero, with spread.

    Args:
        rows: One bar each.
        references: Names of those drawn darker.
    """
    figure = Figure(figsize=(10, 0.9 + height(row.name for row in rows)), layout="constrained")
    axes = figure.subplots()
    for position, row in enumerate(rows):
        found = summarize(
            [r.result.qat_top1_percent - r.result.fp_top1_percent for r in row.runs if r.result]
        )
        assert found is not None
        axes.barh(
            position,
            found.mean,
            xerr=found.std or None,
            color="#2b6cb0" if row.name in references else "#90b4dc",
            ecolor=GREY,
            capsize=3,
            height=0.7,
        )
    axes.set_yticks(range(len(rows)), [label(row.name) for row in rows])
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlabel("top-1 after QAT minus float, points (mean ± standard deviation)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    return figure


def bits(rows: Sequence[Row]) -> Figure:
    """Bits of every layer's weights in every row, averaged over the seeds.

    Where the layer's input has others they stand behind a stroke.
    """
    allocations = [[r.allocation for r in row.runs if r.allocation] for row in rows]
    names = [layer.name for layer in allocations[0][0].layers]
    values, inputs = (
        np.array(
            [
                np.mean([[getattr(x.bits().get(n), field, np.nan) for n in names] for x in found],
                        axis=0)
                for found in allocations
            ]
        )
        for field in ("weight_bits", "activation_bits")
    )  # fmt: skip
    tall = 0.6 + height(row.name for row in rows) + 0.06 * max(map(len, names))
    figure = Figure(figsize=(10, tall), layout="constrained")
    axes = figure.subplots()
    norm = BoundaryNorm(np.arange(0.5, 9), 256)
    axes.imshow(values, aspect="auto", cmap="Blues", norm=norm)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 5 else "black"
        text = f"{value:.2g}"
        if abs(inputs[row, column] - value) > 1e-9:
            text += f" / {inputs[row, column]:.2g}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_yticks(range(len(rows)), [label(row.name) for row in rows])
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.spines[:].set_visible(False)
    return figure
