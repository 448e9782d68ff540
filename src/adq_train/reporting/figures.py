"""Pictures across runs, and how a picture gets into a page."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Collection, Iterator, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from adq_train.reporting.groups import Row
from adq_train.reporting.statistics import summarize

GREY = "#718096"
MARKERS = "osD^v<>PX*hd"
MOST_LETTERS = 60


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


def shortened(name: str) -> str:
    """A row's name that leaves room for the picture."""
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"


def accuracy_and_cost(rows: Sequence[Row]) -> Figure:
    """Top-1 against average bits and against size, a point with its spread for each row."""
    figure = Figure(figsize=(10, 4 + 0.2 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = mpl.colormaps["tab10" if len(rows) <= 10 else "tab20"]
    for panel, cost, label in zip(
        panels,
        ("average_weight_bits", "model_size_bytes"),
        ("average bits of the weights", "packed weights, kB"),
        strict=True,
    ):
        for index, row in enumerate(rows):
            x, y = row.summary(cost), row.summary("qat_top1_percent")
            assert x is not None
            assert y is not None
            unit = 1e3 if cost == "model_size_bytes" else 1
            panel.errorbar(
                x.mean / unit,
                y.mean,
                xerr=(x.std or 0) / unit,
                yerr=y.std or 0,
                fmt=MARKERS[index % len(MARKERS)],
                color=colors(index % colors.N),
                capsize=3,
                label=shortened(row.name),
            )
        level = summarize([r.result.fp_top1_percent for row in rows for r in row.runs if r.result])
        assert level is not None
        panel.axhline(level.mean, color=GREY, linestyle="--", label=f"float: {level.mean:.2f} %")
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("top-1 after QAT, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", frameon=False, ncols=1)
    return figure


def bars(rows: Sequence[Row], references: Collection[str]) -> Figure:
    """Top-1 after QAT minus that of the same seed's float model: bars from zero, with spread.

    Args:
        rows: One bar each.
        references: Names of those drawn darker.
    """
    figure = Figure(figsize=(10, 1.1 + 0.36 * len(rows)), layout="constrained")
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
    axes.set_yticks(range(len(rows)), [shortened(row.name) for row in rows])
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlabel("top-1 after QAT minus float, points (mean ± standard deviation)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    return figure


def bits(rows: Sequence[Row]) -> Figure:
    """Bits of every layer's weights in every row, averaged over the seeds."""
    allocations = [[r.allocation for r in row.runs if r.allocation] for row in rows]
    names = [layer.name for layer in allocations[0][0].layers]
    values = np.array(
        [
            np.mean([[x.bits()[n].weight_bits if n in x.bits() else np.nan for n in names]
                     for x in found], axis=0)
            for found in allocations
        ]
    )  # fmt: skip
    height = 1.4 + 0.3 * len(rows) + 0.06 * max(map(len, names))
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    norm = BoundaryNorm(np.arange(0.5, 9), 256)
    axes.imshow(values, aspect="auto", cmap="Blues", norm=norm)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 5 else "black"
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color)
    axes.set_yticks(range(len(rows)), [shortened(row.name) for row in rows])
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.spines[:].set_visible(False)
    return figure
