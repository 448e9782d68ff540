"""The tables of a report: their cells, and the report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adq_train.reporting import published
from adq_train.reporting.gather import Run
from adq_train.reporting.groups import Row, Section
from adq_train.reporting.leads import leads
from adq_train.reporting.statistics import FEWEST_SEEDS, LEVEL, Difference, Summary
from adq_train.reporting.summary import kilobytes

NONE = "–"
# Average bits that differ by less are called equal.
SAME_BITS = 0.05
WORDS = (0, 9, 10)  # columns of text; the others are numbers
HEADINGS = (
    "run",
    "n",
    "top-1, %",
    "to reference, points",
    "float top-1, %",
    "bits W / A",
    "bits W, all layers",
    "weights",
    "final training loss",
    "what the seeds support",
    "published top-1",
)
LEAD_HEADINGS = (
    "weights",
    "ours",
    "top-1, %",
    "best rival",
    "top-1, %",
    "difference, points",
    "what the seeds support",
)
READING = (
    "Mean ± sample standard deviation over n seeds, on the test split. Bits are averages over the "
    "layers whose bits are chosen; weights are the packed weights of all quantized layers.",
    f"A difference is called a gain or a loss where p < {LEVEL} after Holm's correction over the "
    f"rows of a table, else not shown. With {FEWEST_SEEDS} common seeds or more the test is a "
    "paired t-test over these, else Welch's, two-sided; with fewer there is none.",
    "Ours beside the best rival: at each size the row of ADQ and the row of another weight "
    "quantizer with the best mean validation accuracy; the test split chooses neither.",
    "A training loss marked as taught has a teacher's share in it, and compares only with those "
    "that have the same.",
    "Published figures are others' and were not measured here; training, float model and what the "
    "average of the bits counts differ.",
)


@dataclass(frozen=True)
class Report:
    """Everything that a report says.

    Attributes:
        runs: All that were found.
        sections: The tables.
        known: Published figures.
        title: What its reader sees first.
    """

    runs: tuple[Run, ...]
    sections: tuple[Section, ...]
    known: tuple[published.Published, ...]
    title: str = "Report"

    def origin(self) -> list[str]:
        """When and on what the runs were made, as far as their manifests tell."""
        days = sorted({start[:10] for start in _texts(self.runs, "started")})
        when = [f"{days[0]} to {days[-1]}" if len(days) > 1 else days[0]] if days else []
        machines = [*_texts(self.runs, "processor"), *_texts(self.runs, "hardware")]
        versions = [
            f"{name} {', '.join(found)}"
            for name in ("adq_train", "torch")
            if (found := _texts(self.runs, "versions", name))
        ]
        return [*when, *machines, *versions]

    def problems(self) -> list[str]:
        """What the tables lack: unfinished, failed and damaged runs, missing seeds, remarks."""
        lines = [f"{run.path}: {run.state}, {run.note}" for run in self.runs if run.state != "done"]
        lines += [
            f"{run.path}: {run.note}" for run in self.runs if run.state == "done" and run.note
        ]
        for section in self.sections:
            place = f"{section.model} on {section.data}"
            lines += [f"{place}: {text}" for text in (*section.problems, *section.remarks)]
        return lines


def _texts(runs: Sequence[Run], *path: str) -> list[str]:
    """What the manifests of runs say at a place, sorted, each text once."""
    found = set()
    for run in runs:
        node: Any = run.manifest
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        found |= {node} if isinstance(node, str) and node else set()
    return sorted(found)


def lead_table(section: Section) -> list[list[str]]:
    """Ours beside the best rival at each size, in the order of :data:`LEAD_HEADINGS`."""
    return [
        [
            kilobytes(lead.ours.mean("model_size_bytes")),
            f"{lead.ours.name}{_chosen(lead.among[0])}",
            plus_minus(lead.ours.summary("qat_top1_percent")),
            f"{lead.rival.name}{_chosen(lead.among[1])}",
            plus_minus(lead.rival.summary("qat_top1_percent")),
            NONE if lead.difference is None else f"{lead.difference.mean:+.2f}",
            wording(lead.difference, False),
        ]
        for lead in leads(section.rows)
    ]


def _chosen(among: int) -> str:
    return f" (of {among})" if among > 1 else ""


def plus_minus(summary: Summary | None, form: str = ".2f") -> str:
    """``mean ± standard deviation``, or the mean of a single run."""
    if summary is None:
        return NONE
    spread = "" if summary.std is None else f" ± {summary.std:{form}}"
    return f"{summary.mean:{form}}{spread}"


def wording(difference: Difference | None, is_reference: bool) -> str:
    """What may be said about a difference, with the test behind it."""
    if is_reference:
        return "reference"
    if difference is None:
        return NONE
    n = " and ".join(map(str, difference.n))
    if difference.p_value is None:
        return f"{difference.verdict} (n = {n}){_unequal(difference)}"
    words = (
        f"{difference.verdict}: {difference.test}, n = {n}, p = {difference.p_value:.2g}, "
        f"Holm {difference.p_holm:.2g}"
    )
    if difference.lower_losses:
        words += "; training loss lower in {} of {} seeds".format(*difference.lower_losses)
    return words + _unequal(difference)


def _unequal(difference: Difference) -> str:
    """Says that two rows do not have the same bits, where they have not."""
    if difference.more_bits is None or max(map(abs, difference.more_bits)) < SAME_BITS:
        return ""
    weights, inputs = difference.more_bits
    return f"; not at equal bits: {weights:+.2f} for weights, {inputs:+.2f} for inputs"


def cells(section: Section, known: Sequence[published.Published]) -> list[list[str]]:
    """The table of a section, a list of texts for each row, in the order of :data:`HEADINGS`.

    The last column is left out where nothing is published.
    """
    figures = published.for_section(section, list(known))
    beside = [published.for_row(row, figures) for row in section.rows]
    references, count = section.references_in_use(), len(HEADINGS) if any(beside) else -1
    return [
        _cells(row, row.name in references, difference, found)[:count]
        for row, difference, found in zip(section.rows, section.differences, beside, strict=True)
    ]


def headings(rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Those of the columns that :func:`cells` gives."""
    return HEADINGS[: len(rows[0])] if rows else HEADINGS


def _cells(
    row: Row,
    is_reference: bool,
    difference: Difference | None,
    figures: Sequence[published.Published],
) -> list[str]:
    if not row.runs:
        return [row.name, "0", *[NONE] * (len(HEADINGS) - 2)]
    return [
        row.name,
        str(len(row.runs)),
        plus_minus(row.summary("qat_top1_percent")),
        NONE if difference is None else f"{difference.mean:+.2f}",
        plus_minus(row.summary("fp_top1_percent")),
        f"{row.mean('average_weight_bits'):.2f} / {row.mean('average_activation_bits'):.2f}",
        f"{row.mean('average_weight_bits_all_layers'):.2f}",
        kilobytes(row.mean("model_size_bytes")),
        plus_minus(row.summary("final_train_loss"), ".3g") + (", taught" if row.taught else ""),
        wording(difference, is_reference),
        "; ".join(f"{x}, {x.source}" for x in figures) or NONE,
    ]


def others(section: Section, known: Sequence[published.Published]) -> list[str]:
    """Published figures for the section's data set and model that no row stands beside."""
    figures = published.for_section(section, list(known))
    beside = {x for row in section.rows for x in published.for_row(row, figures)}
    return [f"{x}, {x.source}" for x in figures if x not in beside]


def heading(section: Section) -> str:
    """Model, data set, and what all runs share."""
    return f"{section.model} on {section.data}"


def compared_with(section: Section) -> str:
    """Which rows the others are compared with."""
    names = [row.name for row in section.rows if row.name in section.references_in_use()]
    if len(names) < 2:
        return f"Compared with {names[0]}." if names else ""
    return f"Each row is compared with the reference above it: {'; '.join(names)}."


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~#!])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def markdown(report: Report) -> str:
    """The report as Markdown, without pictures."""
    lines = [f"# {escaped(report.title)}", ""]
    if report.origin():
        lines += [escaped("; ".join(report.origin())), ""]
    problems = report.problems()
    if problems:
        lines += ["## Not in the tables, and remarks", ""]
        lines += [*(f"- {escaped(text)}" for text in problems), ""]
    for section in report.sections:
        lines += [f"## {escaped(heading(section))}", ""]
        if section.common:
            lines += [f"All runs: {escaped(section.common)}", ""]
        if lead := lead_table(section):
            lines += ["Ours beside the best rival, at equal bytes:", ""]
            lines += [*_markdown_table(LEAD_HEADINGS, lead, (1, 3, 6)), ""]
        rows = cells(section, report.known)
        lines += [*_markdown_table(headings(rows), rows, WORDS), ""]
        if compared_with(section):
            lines += [escaped(compared_with(section)), ""]
        left = others(section, report.known)
        if left:
            lines += ["Also published for this network and data set:", ""]
            lines += [*(f"- {escaped(text)}" for text in left), ""]
    lines += ["## How to read this", "", *(f"{text}\n" for text in map(escaped, READING))]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int]
) -> list[str]:
    """Lines of a table; columns of words go to the left, numbers to the right."""
    marks = [":--" if index in words else "--:" for index in range(len(headings))]
    lines = ["| " + " | ".join(headings) + " |", "|" + "|".join(marks) + "|"]
    return lines + ["| " + " | ".join(map(escaped, row)) + " |" for row in rows]


def plain(value: Any) -> Any:
    """A number that JSON can hold: None for NaN and infinity."""
    is_odd = isinstance(value, float) and not -float("inf") < value < float("inf")
    return None if is_odd else value
