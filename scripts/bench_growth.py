"""How cost grows as work grows: with the batch, the depth, the bits, the layers.

    python scripts/bench_growth.py --output outputs/growth            # about ten minutes
    python scripts/bench_growth.py --output outputs/growth --rounds 3 --depths 8 14

Runs the other benchmarks of this folder, one after the other, and writes ``growth.json``,
``growth.md`` and ``growth.png``: the training step's time and memory (bench_step.py, float and
ADQ), the time of profiling (bench_profile.py) and that of the exact allocation
(bench_allocation.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
BLUE, GREY = "#2b6cb0", "#a0aec0"


def run(script: str, *words: object) -> dict[str, Any]:
    """What another benchmark prints as JSON."""
    command = [sys.executable, str(Path(__file__).with_name(script)), "--json", *map(str, words)]
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def steps(
    options: argparse.Namespace, model: str, batch_size: int, bits: Iterable[int]
) -> list[Row]:
    """Rows of bench_step.py: float, and ADQ at each bit-width."""
    size = ("--model", model, "--batch-size", batch_size, "--rounds", options.rounds)
    return list(run("bench_step.py", *size, "--memory", "--bits", *bits)["rows"])


def pair(rows: list[Row], **facts: object) -> Row:
    """The float step and ADQ's of the same process, with what was varied."""
    float_row, row = rows
    return {
        **facts,
        "float_ms": float_row["median_ms"],
        "adq_ms": row["median_ms"],
        "ratio_to_float": row["ratio_to_float"],
        "float_mb": float_row["peak_memory_bytes"] / 1e6,
        "adq_mb": row["peak_memory_bytes"] / 1e6,
    }


def measure(options: argparse.Namespace) -> dict[str, list[Row]]:
    """A list of rows for each thing that grows."""
    batches = [
        pair(steps(options, "resnet20", size, [3]), batch_size=size) for size in options.batch_sizes
    ]
    depths = [pair(steps(options, f"resnet{x}", 64, [3]), depth=x) for x in options.depths]
    float_row, *others = steps(options, "resnet20", 64, options.bits)
    bits = [pair([float_row, row], bits=row["bits"]) for row in others]
    profiles = []
    for depth in options.depths:
        result = run("bench_profile.py", "--depth", depth, "--images", 32, "--repetitions", 1)
        ways = {row["name"]: row["median_ms"] for row in result["rows"]}
        profiles.append(
            {
                "layers": result["layers"],
                "bit_widths": 3,
                "seconds": ways["reuse"] / 1e3,
                "seconds_without_reuse": ways["whole"] / 1e3,
            }
        )
    allocations = [
        {name: row[name] for name in ("layers", "bit_widths", "median_s", "max_s", "unproven")}
        for row in run("bench_allocation.py")["rows"]
    ]
    return {
        "batch_size": batches,
        "depth": depths,
        "bits": bits,
        "profile": profiles,
        "allocation": allocations,
    }


def tables(growth: dict[str, list[Row]]) -> Iterator[str]:
    """Each list as a Markdown table."""
    for rows in growth.values():
        names = list(rows[0])
        yield "| " + " | ".join(x.replace("_", " ") for x in names) + " |"
        yield "|---" * len(names) + "|"
        for row in rows:
            cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values())
            yield "| " + " | ".join(cells) + " |"
        yield ""


def lines(axes: Axes, rows: list[Row], x: str, shown: dict[str, tuple[str, str]]) -> None:
    """Curves from zero over one of the rows' facts."""
    for name, (label, color) in shown.items():
        places = [row[x] for row in rows]
        axes.plot(places, [row[name] for row in rows], "o-", label=label, color=color, ms=4)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x.replace("_", " "))
    axes.spines[["top", "right"]].set_visible(False)
    if len(shown) > 1:
        axes.legend(frameon=False, fontsize=8)


def picture(growth: dict[str, list[Row]]) -> Figure:
    """Time above memory for the step; profiling and allocation beside them."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    grid = figure.subplots(2, 4)
    for column, (x, title) in enumerate(
        {"batch_size": "Step, batch", "depth": "Step, depth", "bits": "Step, bits"}.items()
    ):
        for axes, unit in zip(grid[:, column], ("ms", "mb"), strict=True):
            shown = {f"float_{unit}": ("float", GREY), f"adq_{unit}": ("ADQ", BLUE)}
            lines(axes, growth[x], x, shown)
            axes.set_ylabel({"ms": "ms a step", "mb": "peak memory, MB"}[unit])
        grid[0, column].set_title(title, loc="left")
    shown = {"seconds_without_reuse": ("whole network", GREY), "seconds": ("reuse", BLUE)}
    lines(grid[0, 3], growth["profile"], "layers", shown)
    grid[0, 3].set(title="Profiling, 3 bit-widths", ylabel="seconds")
    rows = [{**x, "choices": x["layers"] * x["bit_widths"]} for x in growth["allocation"]]
    rows.sort(key=lambda row: row["choices"])
    lines(grid[1, 3], rows, "choices", {"median_s": ("", BLUE)})
    grid[1, 3].set(title="Exact allocation", ylabel="seconds", xlabel="layers × bit-widths")
    return figure


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    words.add_argument("--depths", type=int, nargs="+", default=[8, 20, 32, 44])
    words.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--output", type=Path, required=True, help="folder for table and picture")
    options = words.parse_args()
    growth = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "growth.json").write_text(json.dumps(growth, indent=1) + "\n")
    (options.output / "growth.md").write_text("\n".join(tables(growth)))
    picture(growth).savefig(options.output / "growth.png", dpi=110)
    print("\n".join(tables(growth)))


if __name__ == "__main__":
    main()
