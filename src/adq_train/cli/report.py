"""``adq-report``: tables and one page from the folders of runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adq_train.cli.arguments import read
from adq_train.errors import UserError
from adq_train.printable import one_line, printable
from adq_train.reporting import machine, published, tables
from adq_train.reporting.gather import gather
from adq_train.reporting.groups import sections
from adq_train.reporting.tables import Report
from adq_train.storage.files import typed_path, write_text, written_whole

# What fits a terminal; everything else is in the files.
SHOWN = (0, 1, 2, 3, 4, 5, 9)


HELP = """adq-report: tables, pictures and comparisons of runs, from their folders alone.

Examples
  adq-report outputs/quickstart
  adq-report outputs/quickstart reference=ablation=none
  adq-report outputs/a outputs/b output=report title="Two bits on CIFAR-10"

Usage
  adq-report FOLDER ... [setting=value ...]

Settings, with their defaults
  output=FOLDER/report      where to write
  reference=NAME            the row to compare with, by its name or some of its
                            overrides; default: the row with the fewest
                            overrides, of those with the same budget
  title=Report              the page's heading
  json=false                print the tables as JSON
  debug=false               show where an error comes from
"""


@dataclass(frozen=True)
class ReportSettings:
    """The command line of ``adq-report``."""

    folders: tuple[str, ...]
    output: str = ""
    reference: str = ""
    title: str = "Report"
    json: bool = False
    debug: bool = False


def main() -> None:
    """Entry point: the report of the folders on the command line."""
    run(read(ReportSettings, HELP))


def run(settings: ReportSettings) -> None:
    """Gathers, compares, writes ``report.md``, ``report.html`` and ``runs.csv``, and shows.

    Raises:
        UserError: A folder is missing or holds no finished run, or the output cannot be written.
    """
    folders = [typed_path(x) for x in settings.folders]
    report = build(folders, settings.reference or None, settings.title)
    output = typed_path(settings.output) if settings.output else folders[0] / "report"
    if not settings.output and output.is_symlink():
        raise UserError(f"{output} is a link; say where to write with output=FOLDER")
    write(report, output)
    if settings.json:
        print(json.dumps({**machine.as_json(report), "output": str(output)}, allow_nan=False))
        return
    show(report)
    print(printable(f"\nwritten to  {output}\nlook at it  {output / 'report.html'}"))


def build(folders: Sequence[Path], reference: str | None, title: str = "Report") -> Report:
    """Reads the folders and compares their runs.

    Raises:
        UserError: No run is finished; says of each why.
    """
    runs = gather(folders)
    if not any(run.state == "done" for run in runs):
        states = "; ".join(f"{run.path.name}: {run.state}, {run.note}" for run in runs)
        raise UserError(f"none of the runs is finished ({states})")
    found = tuple(sections(runs, reference))
    return Report(tuple(runs), found, tuple(published.load()), title)


def write(report: Report, output: Path) -> None:
    """Writes tables, page and pictures, each file whole or not at all.

    Raises:
        UserError: The folder cannot be written.
    """
    from adq_train.reporting import (
        figures,
        page,
    )  # matplotlib takes a second; errors come before it

    contents = {
        "report.md": tables.markdown(report),
        "runs.csv": machine.csv_text(report),
        "report.html": page.render(report),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output: cannot write to {output} ({os.strerror(error.errno or 0)}); choose another"
        ) from error
    for name, text in contents.items():
        write_text(output / name, printable(text))
    with figures.drawing():
        for section in report.sections:
            for name, figure in figures.png_files(section).items():
                with written_whole(output / name) as path:
                    figure.savefig(path, format="png", dpi=110)


def show(report: Report) -> None:
    """Prints the tables in short, and on standard error what they lack."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    for section in report.sections:
        table = Table(box=None, pad_edge=False, title_justify="left")
        table.title = shown(f"{tables.heading(section)}  {section.common}".strip())
        for index in SHOWN:
            table.add_column(tables.HEADINGS[index], justify="left" if index in (0, 9) else "right")
        for row in tables.cells(section, report.known):
            table.add_row(*(shown(row[index]) for index in SHOWN))
        console.print(table)
    for text in report.problems():
        print(printable(f"note: {text}"), file=sys.stderr)


def shown(text: str) -> str:
    """A text as a cell of rich's tables."""
    return escape(one_line(text))
