"""One line per epoch in ``metrics.csv``, for spreadsheets."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from adq_train.reporting.loggers import TAGS, Logger, Record
from adq_train.storage.files import write_text

COLUMNS = ("stage", "epoch", "step", *TAGS, "seconds")


class CsvLogger(Logger):
    """The figures of all stages in one file, written whole after every epoch."""

    def __init__(self, folder: Path, stage: str, done: int, before: int) -> None:
        super().__init__(folder, stage, done, before)
        self.path = folder / "metrics.csv"
        rows: list[dict[str, str]] = []
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            rows = [x for x in csv.DictReader(io.StringIO(text)) if (x["epoch"] or "").isdigit()]
        self.is_new = not any(x["stage"] == stage for x in rows)
        self.rows = [x for x in rows if x["stage"] != stage or int(x["epoch"]) <= done]

    def epoch(self, record: Record) -> None:
        """Adds a line."""
        self.rows.append({name: str(record[name]) for name in COLUMNS})
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
