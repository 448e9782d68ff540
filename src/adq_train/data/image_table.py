"""A table of image files: a CSV file with the path of each and its class."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from adq_train.data.image_files import ImageFiles, Listed
from adq_train.data.listing import Sample
from adq_train.data.pictures import shown
from adq_train.errors import UserError

PARTS = {"": "train", "train": "train", "val": "val", "validation": "val", "test": "test"}
Row = tuple[str, str, str]  # path, label, part


@dataclass(frozen=True, kw_only=True)
class ImageTable(ImageFiles):
    """Image files that a CSV file lists.

    Attributes:
        root: The file, with a line of names first: ``path`` (from the file's folder, or absolute),
            ``label``, and perhaps ``split`` (``train``, ``val`` or ``test``). Where no line has
            ``test``, ``test_images`` are set aside.
    """

    name: ClassVar[str] = "image_table"

    root: str

    def listed(self) -> Listed:
        """Reads the file.

        Raises:
            UserError: It cannot be read, or a line is something else.
        """
        path = Path(self.root)
        rows = read_table(path)
        classes = tuple(sorted({label for _, label, part in rows if part == "train"}))
        if len(classes) < 2:
            raise UserError(
                f"data.root: {shown(path)} has {len(classes)} classes to train on; two are needed"
            )
        targets = {name: target for target, name in enumerate(classes)}
        unknown = {label for _, label, _ in rows} - targets.keys()
        if unknown:
            raise UserError(
                f"data.root: no line to train on of {shown(path)} has the label {min(unknown)!r}"
            )

        def samples(wanted: str) -> tuple[Sample, ...]:
            return tuple(
                (str(path.parent / name), targets[label])
                for name, label, part in rows
                if part == wanted
            )

        validation, test = samples("val") or None, samples("test") or None
        return Listed(path.parent, classes, samples("train"), validation, test)


def read_table(path: Path) -> list[Row]:
    """The lines of a table of images.

    Raises:
        UserError: It cannot be read, or a line is something else; its number is given.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = csv.DictReader(file)
            names = [name.strip().lower() for name in lines.fieldnames or ()]
            if not {"path", "label"} <= set(names):
                raise UserError(
                    f"data.root: {shown(path)} begins with {','.join(names)[:80]!r}; its first "
                    "line must name the columns path and label, and perhaps split"
                )
            lines.fieldnames = names
            rows = list(_rows(lines, path))
    except (OSError, csv.Error) as error:
        raise UserError(f"data.root: {shown(path)} cannot be read ({error})") from error
    if not rows:
        raise UserError(f"data.root: {shown(path)} lists no images")
    return rows


def _rows(lines: csv.DictReader[str], path: Path) -> Iterator[Row]:
    for line in lines:
        name, label = (_cell(line, column) for column in ("path", "label"))
        part = PARTS.get(_cell(line, "split").lower())
        if not name or not label or part is None or None in line:
            raise UserError(
                f"data.root: line {lines.line_num} of {shown(path)} is not a path, a label and "
                f"perhaps one of {', '.join(list(PARTS)[1:])}"
            )
        yield name, label, part


def _cell(line: Mapping[str, str | Sequence[str] | None], column: str) -> str:
    value = line.get(column)
    return value.strip() if isinstance(value, str) else ""
