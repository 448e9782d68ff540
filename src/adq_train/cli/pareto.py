"""``adq-pareto``: the trade-off between predicted loss and cost, from one sensitivity table."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from adq_train.allocation.allocator import Allocator
from adq_train.allocation.budget import Problem
from adq_train.allocation.greedy import GreedyAllocator
from adq_train.allocation.ilp import IlpAllocator
from adq_train.allocation.pareto import BUDGETS, front, solve, uniform
from adq_train.allocation.problem import problem_of
from adq_train.artifacts import LayerInfo, SensitivityTable
from adq_train.cli.arguments import read, values_of
from adq_train.errors import ConfigError, UserError
from adq_train.reporting import allocation_text as why
from adq_train.settings.schema import BitsConfig, BudgetConfig, about, setting
from adq_train.settings.sections import section_problems
from adq_train.storage.files import typed_path, write_text, written_whole
from adq_train.storage.yaml_files import read_yaml

ALLOCATORS: dict[str, Allocator] = {x.name: x for x in (IlpAllocator(), GreedyAllocator())}


HELP = f"""adq-pareto: predicted loss against cost, from one run, without training.

Examples
  adq-pareto outputs/quickstart/default-5be24364
  adq-pareto run over=bops budget.model_size_bytes=0.08x
  adq-pareto sensitivity.json bits.candidates=[2,4]

Usage
  adq-pareto RUN_FOLDER|SENSITIVITY.JSON [setting=value ...]

Settings, with their defaults
  over={BUDGETS[0]}  the budget to vary; or
                            {", ".join(BUDGETS[1:3])},
                            {", ".join(BUDGETS[3:])}
  points=40                 how many budgets
  budget.NAME=AMOUNT        another budget that must hold too: budget.bops=0.01x
  bits.KEY=VALUE            as adq-train has them, by default those of the run:
                            bits.candidates=[2,3] bits.first_last=null
                            'bits.pinned={{fc: 8}}' bits.tied=false
  allocator=ilp             who chooses; or {", ".join(x for x in ALLOCATORS if x != "ilp")}
  output=FOLDER             for pareto.csv and pareto.png; default: beside the
                            sensitivities
  debug=false               show where an error comes from
"""


@dataclass(frozen=True)
class ParetoSettings:
    """The command line of ``adq-pareto``."""

    path: str
    over: str = setting(BUDGETS[0], "The budget to vary.", choices=BUDGETS)
    points: int = setting(40, "How many budgets.", minimum=2)
    budget_changes: dict[str, str] = field(default_factory=dict)
    bits_changes: dict[str, str] = field(default_factory=dict)
    allocator: str = setting("ilp", "Who chooses.", choices=tuple(ALLOCATORS))
    output: str = ""
    debug: bool = False


def main() -> None:
    """Solves many budgets, writes ``pareto.csv`` and ``pareto.png``, prints a table."""
    run(read(ParetoSettings, HELP))


def run(settings: ParetoSettings) -> None:
    """Does what the settings say.

    Raises:
        UserError: A file or a setting is wrong.
    """
    path = typed_path(settings.path)
    folder = path if path.is_dir() else path.parent
    file = folder / "sensitivity.json" if path.is_dir() else path
    table = read_table(file)
    problem = problem_from(settings, table, read_bits(folder / "config.yaml"))
    allocator = ALLOCATORS[settings.allocator]
    began = time.perf_counter()
    solved = list(solve(allocator, problem, table, settings.over, settings.points))
    seconds = time.perf_counter() - began
    best, same = front(solved, settings.over), uniform(problem, table)
    if not has_inputs(table):
        best, same = (
            [replace(x, average_activation_bits=math.nan) for x in some] for some in (best, same)
        )

    from adq_train.reporting import pareto  # draws, which takes a second to import

    target = typed_path(settings.output) if settings.output else folder
    if not target.is_dir():
        raise UserError(f"output: {target} is no folder")
    write_text(target / "pareto.csv", pareto.to_csv([*best, *same]))
    with written_whole(target / "pareto.png") as temporary:
        pareto.draw(best, same, table.metric).savefig(temporary, format="png", dpi=110)
    width = None if sys.stdout.isatty() else 120
    console = Console(width=width, soft_wrap=True)
    console.print(pareto.to_table([*best, *same]))
    if best[0].caveat:
        console.print(f"\nBits by {why.solved(best[0])}", markup=False)
    console.print(f"\n{settings.points} budgets solved in {seconds:.1f} s; {len(best)} differ")
    console.print(f"written to  {target / 'pareto.csv'}\n            {target / 'pareto.png'}")


def read_table(file: Path) -> SensitivityTable:
    """The table in a file.

    Raises:
        UserError: There is none, or it has no layers.
    """
    try:
        table = SensitivityTable.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(
            f"{file} cannot be read ({reason}); give a run's folder, or its sensitivity.json"
        ) from error
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
    settings: ParetoSettings, table: SensitivityTable, of_run: dict[str, Any]
) -> Problem:
    """Layers, pins, candidates and the limits that hold besides the one that is varied.

    Args:
        settings: The command line.
        table: What was measured.
        of_run: The ``bits`` section of the run.

    Raises:
        UserError: A setting is wrong, or the table lacks what it needs.
    """
    given = values_of(settings.bits_changes)
    if "candidates" in given:  # those of single layers were chosen from other ones
        of_run = {name: x for name, x in of_run.items() if name != "candidates_per_layer"}
    known = {name: of_run[name] for name in about(BitsConfig) if name in of_run}
    bits = {**vars(BitsConfig(list(table.bit_widths))), **known, **given}
    amounts = {**vars(BudgetConfig()), **values_of(settings.budget_changes)}
    problems = [*section_problems("bits", bits), *section_problems("budget", amounts)]
    if not isinstance(bits["tied"], bool):
        problems.append(f"bits.tied: must be true or false, got {bits['tied']!r}")
    if problems:
        raise ConfigError(problems)
    limits = [name for name, amount in amounts.items() if amount is not None]
    if not has_inputs(table) and "average_activation_bits" in (settings.over, *limits):
        raise UserError(
            "average_activation_bits: this sensitivity.json does not hold num_inputs of its "
            "layers; measure it anew, or take another budget"
        )
    layers = tuple(
        LayerInfo(x.name, x.num_weights, x.macs, x.num_inputs or 1) for x in table.layers
    )
    problem = problem_of(layers, BitsConfig(**bits), BudgetConfig(**amounts))
    problem.check()
    return problem
