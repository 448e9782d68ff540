"""``adq-report``: tables and one page from the folders of runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adq_train.errors import UserError
from adq_train.printable import one_line, printable
from adq_train.reporting import machine, published, tables
from adq_train.reporting.gather import gather
from adq_train.reporting.groups import sections
from adq_train.reporting.tables import Report
from adq_train.storage.files import typed_path, write_text, written_whole

# What fits a terminal; everything else is in the files.
SHOWN = (0, 1, 2, 5, 6, 8, 9)


def main() -> None:
    """Entry point: the report of the folders on the command line."""
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(1)


def run(arguments: Sequence[str]) -> None:
    """Gathers, compares, writes ``report.md``, ``report.html`` and ``runs.csv``, and shows.

    Raises:
        UserError: A folder is missing or holds no finished run, or the output cannot be written.
    """
    options = parser().parse_args(arguments)
    report = build(options.folders, options.reference, options.title)
    output: Path = options.output or options.folders[0] / "report"
    if options.output is None and output.is_symlink():
        raise UserError(f"{output} is a link; say where to write with --output DIR")
    write(report, output)
    if options.json:
        print(json.dumps({**machine.as_json(report), "output": str(output)}, allow_nan=False))
        return
    show(report)
    print(printable(f"\nwritten to  {output}\nlook at it  {output / 'report.html'}"))


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        "adq-report",
        description="Tables, pictures and comparisons of finished runs, from their folders alone.",
    )
    made.add_argument(
        "folders", type=typed_path, nargs="+", metavar="FOLDER", help="a run or a sweep"
    )
    made.add_argument("--output", type=typed_path, metavar="DIR", help="default: FOLDER/report")
    made.add_argument(
        "--reference",
        metavar="NAME",
        help="the row to compare with, by its name or some of its overrides; default: the row with "
        "the fewest overrides, of those with the same budget",
    )
    made.add_argument(
        "--title", default="Report", metavar="TEXT", help="the page's heading; default: Report"
    )
    made.add_argument("--json", action="store_true", help="print the tables as JSON")
    return made


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
            f"--output: cannot write to {output} ({os.strerror(error.errno or 0)}); choose another"
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
