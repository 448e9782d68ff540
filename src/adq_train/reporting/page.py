"""A report as one HTML page that needs nothing else: styles and pictures are inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure

from adq_train.reporting import figures, plots
from adq_train.reporting.groups import Row, Section
from adq_train.reporting.tables import (
    HEADINGS,
    READING,
    Report,
    cells,
    compared_with,
    heading,
    others,
)

# A grid of runs would make a page of hundreds of pictures.
MOST_DETAILS = 12
WORDS = (0, 9, 10)  # columns of text; the others are numbers


def render(report: Report) -> str:
    """The whole page. Every text that comes from a run's folder is escaped."""
    css = files("adq_train.reporting").joinpath("page.css").read_text(encoding="utf-8")
    finished = sum(run.state == "done" for run in report.runs)
    with figures.drawing():
        body = [
            "<h1>Report</h1>",
            f'<p class="soft">{finished} of {len(report.runs)} runs are done.</p>',
            *_problems(report.problems()),
            *(part for section in report.sections for part in _section(section, report)),
            "<h2>How to read this</h2>",
            *(f"<p>{escape(text)}</p>" for text in READING),
        ]
    # The page asks for nothing, and is not allowed to.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>adq-train: report</title>",
            f"<style>\n{css}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>\n",
        ]
    )


def _problems(problems: Sequence[str]) -> Iterable[str]:
    if problems:
        yield '<div class="problems"><h3>Not in the tables, and remarks</h3><ul>'
        yield from (f"<li>{escape(text)}</li>" for text in problems)
        yield "</ul></div>"


def _section(section: Section, report: Report) -> Iterable[str]:
    yield f"<h2>{escape(heading(section))}</h2>"
    if section.common:
        yield f'<p class="soft">All runs: <code>{escape(section.common)}</code></p>'
    yield from _table(section, report)
    if compared_with(section):
        yield f"<p>{escape(compared_with(section))}</p>"
    left = others(section, report.known)
    if left:
        yield "<details><summary>Also published for this network and data set</summary><ul>"
        yield from (f"<li>{escape(text)}</li>" for text in left)
        yield "</ul></details>"
    rows = [row for row in section.rows if row.runs]
    if not rows:
        return
    yield "<h3>Accuracy and cost</h3>"
    yield _image(figures.accuracy_and_cost(rows), "Top-1 against average bits and against size")
    yield "<h3>Beside the float model</h3>"
    yield _image(
        figures.bars(rows, section.references_in_use()), "Top-1 after QAT minus float, for each row"
    )
    yield "<h3>Bits of each layer</h3>"
    yield _image(figures.bits(rows), "Bits of each layer in each row")
    yield from _details(rows)


def _table(section: Section, report: Report) -> Iterable[str]:
    yield '<div class="wide"><table><thead><tr>'
    for index, text in enumerate(HEADINGS):
        yield f"<th{_kind(index)}>{escape(text)}</th>"
    yield "</tr></thead><tbody>"
    table = cells(section, report.known)
    for row, texts in zip(section.rows, table, strict=True):
        is_reference = row.name in section.references_in_use()
        yield '<tr class="reference">' if is_reference else "<tr>"
        yield "".join(
            f"<td{_kind(index, text)}>{escape(text)}</td>" for index, text in enumerate(texts)
        )
        yield "</tr>"
    yield "</tbody></table></div>"


def _kind(index: int, text: str = "") -> str:
    """The class of a cell: words to the left, gains and losses in colour."""
    if index not in WORDS:
        return ""
    verdict = text.split(":")[0] if index == 9 else ""
    return f' class="text {verdict}"' if verdict in ("gain", "loss") else ' class="text"'


def _details(rows: Sequence[Row]) -> Iterable[str]:
    """Sensitivity and codebooks of each row's first seed; equal tables are drawn once."""
    drawn: dict[Any, str] = {}
    yield "<h3>Sensitivity, and codebooks over time</h3>"
    for row in rows[:MOST_DETAILS]:
        run = row.runs[0]
        yield f"<details><summary>{escape(row.name)} (seed {run.seed})</summary>"
        if run.sensitivity is not None:
            key = run.sensitivity.to_json()
            if key in drawn:
                yield f"<p>Sensitivity as in {escape(drawn[key])}.</p>"
            else:
                drawn[key] = row.name
                yield _image(plots.sensitivity(run.sensitivity), "Sensitivity of each layer")
        else:
            yield "<p>No sensitivity table.</p>"
        records = _with_codebooks(run.records)
        if records:
            yield "<p>Levels of each layer's codebook, by epoch of QAT:</p>"
            yield _image(plots.codebooks(records), "Codebooks over time")
        else:
            yield "<p>No codebooks were recorded.</p>"
        yield "</details>"
    if len(rows) > MOST_DETAILS:
        left = ", ".join(row.name for row in rows[MOST_DETAILS:])
        yield f'<p class="soft">Not drawn, to keep the page small: {escape(left)}.</p>'


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


def _image(figure: Figure, what: str) -> str:
    return f'<img alt="{escape(what)}" src="{figures.data_uri(figure)}">'
