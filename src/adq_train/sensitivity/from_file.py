"""A sensitivity table of another run, of another tool, or written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from adq_train.allocation.allocator import not_apart
from adq_train.artifacts import VALUES, LayerInfo, LayerSensitivity, SensitivityTable
from adq_train.errors import UserError
from adq_train.sensitivity.base import Conditions


@dataclass(frozen=True)
class FromFile:
    """Ω[l, b] as a ``sensitivity.json`` has it; what it has besides is left out.

    Of each layer ``name`` and ``sensitivity`` are enough. Counts come from the model; those in the
    file must agree with it.

    Attributes:
        path: The file.
    """

    path: str

    def __post_init__(self) -> None:
        try:
            self.table()
        except UserError as error:
            raise ValueError(str(error).removeprefix("sensitivity.")) from error

    @property
    def name(self) -> str:
        """The name of the metric that the file has the values of."""
        return self.table().metric

    def table(self) -> SensitivityTable:
        """The content of the file.

        Raises:
            UserError: It cannot be read, or is something else.
        """
        path = Path(self.path)
        if not path.is_file():
            raise UserError(
                f"sensitivity.path: there is no file {path}; give a run's sensitivity.json"
            )
        try:
            table = SensitivityTable.from_json(path.read_text(encoding="utf-8"), by_hand=True)
        except UserError as error:
            raise UserError(f"sensitivity.path: {path} is {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"sensitivity.path: {path} cannot be read ({error})") from error
        return table

    def check(self, layers: Sequence[LayerInfo], bit_widths: Sequence[int], apart: bool) -> None:
        """Compares the file with the model's layers; see :class:`~.base.ReadsAhead`.

        Raises:
            UserError: A layer or a bit-width is not in the file, or a layer is another one.
        """
        require_cover(self.table(), layers, bit_widths, f"sensitivity.path: {self.path}")
        if apart and any(x.activation_sensitivity is None for x in self.table().layers):
            raise UserError(not_apart(f"{self.path} ({self.name})"))

    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Reads the rows of the model's layers; see :class:`~.base.SensitivityMetric`.

        Raises:
            UserError: A layer or a bit-width is not in the file, or a layer is another one.
        """
        self.check(layers, conditions.bit_widths, apart=False)
        yield from rows_of(self.table(), layers, conditions.bit_widths)


@dataclass(frozen=True)
class FromTable:
    """Ω[l, b] as a table has it, of which names and values are enough.

    Attributes:
        table: Of all layers of the model, at all candidates.
    """

    table: SensitivityTable

    @property
    def name(self) -> str:
        """The name of the metric that the table has the values of."""
        return self.table.metric

    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Reads the rows of the model's layers; see :class:`~.base.SensitivityMetric`.

        Raises:
            UserError: A layer or a bit-width is not in the table, or a layer is another one.
        """
        require_cover(self.table, layers, conditions.bit_widths, "sensitivity: the table")
        yield from rows_of(self.table, layers, conditions.bit_widths)


def require_cover(
    table: SensitivityTable, layers: Sequence[LayerInfo], bit_widths: Sequence[int], what: str
) -> None:
    """Refuses a table that does not say enough of some layers.

    Args:
        table: The table.
        layers: Of the model.
        bit_widths: The candidates.
        what: The table in words, for messages.

    Raises:
        UserError: A layer or a bit-width is not in it, or a layer is another one.
    """
    rows = {row.name: row for row in table.layers}
    problems = [problem for x in layers if (problem := _problem(x, rows, bit_widths))]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{what} does not cover this model: {'; '.join(problems[:3])}{more}; measure it anew "
            f"with this model and bits.candidates={list(bit_widths)}"
        )


def rows_of(
    table: SensitivityTable, layers: Sequence[LayerInfo], bit_widths: Sequence[int]
) -> Iterator[LayerSensitivity]:
    """The rows of some layers, at the candidates alone, with the model's counts."""
    rows = {row.name: row for row in table.layers}
    for info in layers:
        row = rows[info.name]
        values: dict[str, Any] = {
            key: {bits: found[bits] for bits in bit_widths if bits in found}
            for key in VALUES
            if (found := getattr(row, key)) is not None
        }
        yield replace(row, num_weights=info.num_weights, macs=info.macs, **values)


def _problem(
    info: LayerInfo, rows: dict[str, LayerSensitivity], bit_widths: Sequence[int]
) -> str | None:
    """What a file lacks for one layer, or None."""
    row = rows.get(info.name)
    if row is None:
        return f"it has no layer {info.name}"
    for what, there, here in (
        ("weights", row.num_weights, info.num_weights),
        ("multiply-accumulates (macs)", row.macs, info.macs),
        ("inputs", row.num_inputs, info.num_inputs),
    ):
        if there and there != here:
            return f"layer {info.name} has {there} {what} there, {here} here"
    for what, values in row.by_tensors():
        missing = [str(bits) for bits in bit_widths if bits not in values]
        if missing:
            return f"{what} {info.name} has no value at {', '.join(missing)} bits"
    return None
