"""``adq-pareto``: the trade-off between predicted loss and cost, from one sensitivity table."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from adq_train.allocation.budget import Problem, budget_from
from adq_train.allocation.greedy import GreedyAllocator
from adq_train.allocation.ilp import IlpAllocator
from adq_train.allocation.pareto import BUDGETS, front, solve, uniform
from adq_train.allocation.patterns import by_layer, pinned_bits
from adq_train.artifacts import LayerInfo, SensitivityTable
from adq_train.errors import UserError
from adq_train.printable import printable
from adq_train.reporting import allocation_text as why
from adq_train.storage.files import typed_path, write_text, written_whole
from adq_train.storage.yaml_files import read_yaml

ALLOCATORS = (IlpAllocator(), GreedyAllocator())


def main(arguments: Sequence[str] | None = None) -> None:
    """Solves many budgets, writes ``pareto.csv`` and ``pareto.png``, prints a table."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="adq-pareto",
        description="Predicted loss against cost, from the sensitivities of one run. Pins, "
        "candidates and tied bits are those of the run unless given here.",
    )
    words.add_argument("path", type=typed_path, help="a run's folder, or a sensitivity.json")
    words.add_argument("--over", choices=BUDGETS, default=BUDGETS[0], help="the budget to vary")
    words.add_argument("--points", type=int, default=40, help="how many budgets (default: 40)")
    words.add_argument(
        "--limit", action="append", default=[], metavar="BUDGET=AMOUNT",
        help="another budget that must hold besides, such as bops=0.01x",
    )  # fmt: skip
    words.add_argument("--candidates", metavar="2,3,4", help="bit-widths to choose from")
    words.add_argument("--first-last", metavar="BITS", help="of the first and last layer, or null")
    words.add_argument(
        "--pin", action="append", metavar="PATTERN=BITS", help="bits of further layers"
    )
    words.add_argument(
        "--separate", action="store_true", default=None, help="choose weights and inputs apart"
    )
    names = [x.name for x in ALLOCATORS]
    words.add_argument("--allocator", choices=names, default=names[0], help="who chooses")
    words.add_argument(
        "--output", type=typed_path, help="folder for the files (default: the table's)"
    )
    return words


def run(options: argparse.Namespace) -> None:
    """Does what the options say.

    Raises:
        UserError: A file or an option is wrong.
    """
    if options.points < 2:
        raise UserError(f"--points: must be at least 2, got {options.points}")
    folder = options.path if options.path.is_dir() else options.path.parent
    file = folder / "sensitivity.json" if options.path.is_dir() else options.path
    table = read_table(file)
    problem = problem_from(options, table, read_bits(folder / "config.yaml"))
    (allocator,) = (x for x in ALLOCATORS if x.name == options.allocator)
    began = time.perf_counter()
    solved = list(solve(allocator, problem, table, options.over, options.points))
    seconds = time.perf_counter() - began
    best, same = front(solved, options.over), uniform(problem, table)
    if not has_inputs(table):
        best, same = (
            [replace(x, average_activation_bits=math.nan) for x in some] for some in (best, same)
        )

    from adq_train.reporting import pareto  # draws, which takes a second to import

    target = options.output or folder
    if not target.is_dir():
        raise UserError(f"--output: {target} is no folder")
    write_text(target / "pareto.csv", pareto.to_csv([*best, *same]))
    with written_whole(target / "pareto.png") as temporary:
        pareto.draw(best, same, table.metric).savefig(temporary, format="png", dpi=110)
    width = None if sys.stdout.isatty() else 120
    console = Console(width=width, soft_wrap=True)
    console.print(pareto.to_table([*best, *same]))
    if best[0].caveat:
        console.print(f"\nBits by {why.solved(best[0])}", markup=False)
    console.print(f"\n{options.points} budgets solved in {seconds:.1f} s; {len(best)} differ")
    console.print(f"written to  {target / 'pareto.csv'}\n            {target / 'pareto.png'}")


def read_table(file: Path) -> SensitivityTable:
    """The table in a file.

    Raises:
        UserError: There is none, or it has no layers.
    """
    try:
        table = SensitivityTable.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error
    except UserError as error:
        raise UserError(f"{file} is {error}") from error
    if not table.layers:
        raise UserError(f"{file} has no layers")
    return table


def has_inputs(table: SensitivityTable) -> bool:
    """Whether the average bits of the activations can be counted."""
    return all(x.num_inputs is not None for x in table.layers)


def read_bits(file: Path) -> dict[str, Any]:
    """The ``bits`` section of a run's configuration; empty where there is none.

    Raises:
        UserError: The file is damaged.
    """
    if not file.exists():
        return {}
    try:
        content = read_yaml(file)
    except UserError as error:
        raise UserError(f"{file} is not the configuration of a run ({error})") from error
    bits = content.get("bits") if isinstance(content, dict) else None
    if not isinstance(bits, dict):
        raise UserError(f"{file} is not the configuration of a run (it has no section bits)")
    return bits


def problem_from(
    options: argparse.Namespace, table: SensitivityTable, bits: dict[str, Any]
) -> Problem:
    """Layers, pins, candidates and the limits that hold besides the one that is varied.

    Raises:
        UserError: An option is wrong, or the table lacks what it needs.
    """
    limits = dict(pair("--limit", text, "bops=0.01x") for text in options.limit)
    unknown = set(limits) - set(BUDGETS)
    if unknown:
        raise UserError(f"--limit: {min(unknown)!r} is not one of {', '.join(BUDGETS)}")
    if not has_inputs(table) and "average_activation_bits" in (options.over, *limits):
        raise UserError(
            "average_activation_bits: this sensitivity.json does not hold num_inputs of its "
            "layers; measure it anew, or take another budget"
        )
    layers = tuple(
        LayerInfo(x.name, x.num_weights, x.macs, x.num_inputs or 1) for x in table.layers
    )
    amounts = {
        name: text if text.endswith("x") else number("--limit", text)
        for name, text in limits.items()
    }
    try:
        budget = budget_from(amounts, layers)
    except ValueError as error:
        raise UserError(f"--limit: {error}") from error
    first_last = bits.get("first_last", 8)
    if options.first_last is not None:
        first_last = None if options.first_last == "null" else width(options.first_last)
    pins = bits.get("pinned") or {}
    if options.pin is not None:
        given = [pair("--pin", text, "fc=8") for text in options.pin]
        pins = {name: width(text) for name, text in given}
    candidates = tuple(bits.get("candidates") or table.bit_widths)
    own = bits.get("candidates_per_layer") or {}
    if options.candidates is not None:
        candidates = tuple(sorted({width(x) for x in options.candidates.split(",")}))
        own = {}
    tied = bits.get("tied", True) if options.separate is None else False
    own_by_layer = by_layer("bits.candidates_per_layer", own, layers)
    problem = Problem(
        layers,
        pinned_bits(layers, first_last, pins),
        candidates,
        budget,
        {name: tuple(widths) for name, widths in own_by_layer.items()},
        tied,
    )
    problem.check()
    return problem


def pair(option: str, text: str, example: str) -> tuple[str, str]:
    """Splits ``name=value``.

    Raises:
        UserError: There is no equals sign.
    """
    name, equals, value = text.rpartition("=")
    if not equals:
        raise UserError(f"{option}: {text!r} is not of the form {example}")
    return name, value


def number(option: str, text: str) -> float:
    """A positive number.

    Raises:
        UserError: The text is something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{option}: {text!r} is neither a positive number nor a share (0.1x)")
    return value


def width(text: str) -> int:
    """A bit-width.

    Raises:
        UserError: The text is something else.
    """
    if text not in [str(b) for b in range(2, 9)]:
        raise UserError(f"bit-width: must be 2 … 8, got {text!r}")
    return int(text)
