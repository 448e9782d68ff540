"""A report for other programs: one CSV row per run, and JSON."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from adq_train.allocation.budget import Figures
from adq_train.reporting import published
from adq_train.reporting.gather import Run
from adq_train.reporting.groups import Row
from adq_train.reporting.statistics import Difference
from adq_train.reporting.tables import Report, plain

FIGURES = ("fp_top1_percent", "ptq_top1_percent", "qat_top1_percent", "qat_top5_percent")
FINALS = ("final_train_loss", "final_validation_top1_percent")  # of the last epoch of QAT
COSTS = tuple(x.name for x in fields(Figures))
ORIGINS = ("commit", "python", "torch", "device", "command")
COLUMNS = ("data", "model", "row", "seed", "state", "note", *FIGURES, *FINALS,
           "num_test_images", *COSTS, "seconds", "path", *ORIGINS)  # fmt: skip


def csv_text(report: Report) -> str:
    """One row for each run that was found, finished or not; empty where there is no value."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    placed = {
        run.path: {"data": section.data, "model": section.model, "row": row.name, "seed": run.seed}
        for section in report.sections
        for row in section.rows
        for run in row.members
    }
    for run in report.runs:
        cells = {**placed.get(run.path, {}), **_figures(run), **_origin(run)}
        writer.writerow({name: harmless(value) for name, value in cells.items()})
    return text.getvalue()


def harmless(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that could be one is quoted."""
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if is_formula else value


def _figures(run: Run) -> dict[str, Any]:
    values: dict[str, Any] = {"state": run.state, "note": run.note, "path": str(run.path)}
    values |= {name: getattr(run, name) for name in FINALS}
    if run.result and run.allocation:
        values |= {name: getattr(run.result, name) for name in (*FIGURES, "num_test_images")}
        values |= {name: getattr(run.allocation, name) for name in COSTS}
        values["seconds"] = sum(run.result.seconds.values())
    return values


def _origin(run: Run) -> dict[str, Any]:
    """What made the run: source, versions, device and command, as its manifest has them."""

    def part(name: str) -> dict[str, Any]:
        found = run.manifest.get(name)
        return found if isinstance(found, dict) else {}

    git, versions, command = part("git"), part("versions"), run.manifest.get("command")
    commit = git.get("commit")
    return {
        "commit": f"{commit} + changes" if commit and git.get("dirty") else commit,
        "python": versions.get("python"),
        "torch": versions.get("torch"),
        "device": run.manifest.get("device"),
        "command": shlex.join(map(str, command)) if isinstance(command, list) else None,
    }


def as_json(report: Report) -> dict[str, Any]:
    """What the tables say, as plain values; null where there is no value."""
    return {
        "sections": [
            {
                "data": section.data,
                "model": section.model,
                "common": section.common,
                "rows": [
                    _row(row, reference, difference, figures)
                    for row, reference, difference in zip(
                        section.rows, section.references, section.differences, strict=True
                    )
                ],
                "published": [asdict(x) for x in figures],
            }
            for section in report.sections
            for figures in [published.for_section(section, list(report.known))]
        ],
        "problems": report.problems(),
    }


def _row(
    row: Row,
    reference: str | None,
    difference: Difference | None,
    figures: Sequence[published.Published],
) -> dict[str, Any]:
    summaries = {
        name: found and {key: plain(value) for key, value in asdict(found).items()}
        for name in (*FIGURES, "final_train_loss", *COSTS)
        for found in [row.summary(name)]
    }
    return {
        "name": row.name,
        "seeds": [run.seed for run in row.runs],
        "reference": reference,
        **summaries,
        "difference": difference and asdict(difference),
        "published": [asdict(x) for x in published.for_row(row, list(figures))],
    }
