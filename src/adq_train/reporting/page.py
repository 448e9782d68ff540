"""A report as one HTML page that needs nothing else: styles and pictures are inside.

``page.html.j2`` says how it looks; here is what it shows.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from adq_train.reporting import figures, plots
from adq_train.reporting.groups import Row, Section
from adq_train.reporting.tables import (
    LEAD_HEADINGS,
    READING,
    WORDS,
    Report,
    cells,
    compared_with,
    heading,
    headings,
    lead_table,
    others,
)

# A grid of runs would make a page of hundreds of pictures.
MOST_DETAILS = 12
LEAD_WORDS = (1, 3, 6)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its class in the style sheet, and its text."""

    kind: str
    text: str


@dataclass(frozen=True)
class TableRow:
    """A row of a table, and whether others are compared with it."""

    is_reference: bool
    cells: list[Cell]


@dataclass(frozen=True)
class Picture:
    """A picture of a whole section: its heading, its description, and itself as a data URI."""

    heading: str
    what: str
    uri: str


@dataclass(frozen=True)
class Details:
    """Pictures of a row's first seed as data URIs, None where there is nothing to draw.

    Attributes:
        name: The row's.
        seed: The seed that is drawn.
        sensitivity: The sensitivity table.
        same_as: The row above whose sensitivity table is the same and is drawn.
        codebooks: Levels over time.
    """

    name: str
    seed: int
    sensitivity: str | None
    same_as: str | None
    codebooks: str | None


@dataclass(frozen=True)
class Part:
    """All that the page shows of a section; texts are empty where there is nothing to say."""

    heading: str
    common: str
    leads: list[list[Cell]]
    headings: list[Cell]
    table: list[TableRow]
    compared_with: str
    others: list[str]
    pictures: list[Picture]
    details: list[Details]
    not_drawn: list[str]


def render(report: Report) -> str:
    """The whole page. Every text that comes from a run's folder is escaped."""
    environment = Environment(
        loader=PackageLoader("adq_train.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # The one script that the page may run is named by its hash.
    script = resources.files("adq_train.reporting").joinpath("page.js").read_text("utf-8")
    with figures.drawing():
        parts = [_part(section, report) for section in report.sections]
    return environment.get_template("page.html.j2").render(
        report=report,
        finished=sum(run.state == "done" for run in report.runs),
        problems=report.problems(),
        lead_headings=[
            _cell(*cell, words=LEAD_WORDS, verdict_at=6) for cell in enumerate(LEAD_HEADINGS)
        ],
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sections=parts,
        reading=READING,
    )


def _part(section: Section, report: Report) -> Part:
    rows = [row for row in section.rows if row.runs]
    texts = cells(section, report.known)
    references = section.references_in_use()
    return Part(
        heading=heading(section),
        common=section.common,
        leads=[
            [_cell(*cell, words=LEAD_WORDS, verdict_at=6) for cell in enumerate(texts)]
            for texts in lead_table(section)
        ],
        headings=[_cell(*cell) for cell in enumerate(headings(texts))],
        table=[
            TableRow(row.name in references, [_cell(*cell) for cell in enumerate(of)])
            for row, of in zip(section.rows, texts, strict=True)
        ],
        compared_with=compared_with(section),
        others=others(section, report.known),
        pictures=_pictures(rows, references) if rows else [],
        details=_details(rows[:MOST_DETAILS]),
        not_drawn=[row.name for row in rows[MOST_DETAILS:]],
    )


def _cell(index: int, text: str, words: Sequence[int] = WORDS, verdict_at: int = 9) -> Cell:
    """Words go to the left, numbers to the right; gains and losses are in colour."""
    verdict = text.split(":")[0] if index == verdict_at else ""
    if verdict in ("gain", "loss"):
        return Cell(f"text {verdict}", text)
    return Cell("text" if index in words else "number", text)


def _pictures(rows: Sequence[Row], references: Collection[str]) -> list[Picture]:
    bars = figures.bars(rows, references)
    drawn: list[tuple[str, str, Figure | None]] = [
        (
            "Accuracy and cost",
            "Top-1 against average bits and against size",
            figures.accuracy_and_cost(rows),
        ),
        ("Beside the float model", "Top-1 after QAT minus float, for each row", bars),
        ("Learning curves", "Loss and validation accuracy by epoch", figures.curves(rows)),
        ("Bits of each layer", "Bits of each layer in each row", figures.bits(rows)),
    ]
    return [Picture(name, what, figures.data_uri(figure)) for name, what, figure in drawn if figure]


def _details(rows: Sequence[Row]) -> list[Details]:
    """Sensitivity and codebooks of each row's first seed; equal tables are drawn once."""
    drawn: dict[Any, str] = {}
    found = []
    for row in rows:
        run = row.runs[0]
        sensitivity = same_as = None
        if run.sensitivity is not None:
            key = run.sensitivity.to_json()
            same_as = drawn.get(key)
            if same_as is None:
                drawn[key] = row.name
                sensitivity = figures.data_uri(plots.sensitivity(run.sensitivity))
        records = _with_codebooks(run.records)
        codebooks = figures.data_uri(plots.codebooks(records)) if records else None
        found.append(Details(row.name, run.seed, sensitivity, same_as, codebooks))
    return found


def _with_codebooks(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of QAT whose codebooks can be drawn: lists of numbers, of one shape throughout."""
    found: list[dict[str, Any]] = []
    for record in records:
        books = record.get("codebooks")
        if not isinstance(books, dict) or not books or not isinstance(record.get("epoch"), int):
            continue
        if not all(
            isinstance(x, list) and x and all(isinstance(v, int | float) for v in x)
            for x in books.values()
        ):
            continue
        shape = {name: len(x) for name, x in books.items()}
        if not found or shape == {k: len(v) for k, v in found[0]["codebooks"].items()}:
            found.append(record)
    return found
