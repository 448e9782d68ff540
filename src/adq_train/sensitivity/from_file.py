"""A sensitivity table that another run, or another tool, has measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from adq_train.artifacts import LayerInfo, LayerSensitivity, SensitivityTable
from adq_train.errors import UserError
from adq_train.sensitivity.base import Conditions


@dataclass(frozen=True)
class FromFile:
    """Ω[l, b] as a ``sensitivity.json`` has it; what it has besides is left out.

    Attributes:
        path: The file.
    """

    path: str

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise ValueError(f"path: there is no file {self.path}; give a run's sensitivity.json")

    @property
    def name(self) -> str:
        """The name of the metric that the file has the values of."""
        return self.table().metric

    def table(self) -> SensitivityTable:
        """The content of the file.

        Raises:
            UserError: It cannot be read, or is something else.
        """
        try:
            return SensitivityTable.from_json(Path(self.path).read_text(encoding="utf-8"))
        except UserError as error:
            raise UserError(f"sensitivity.path: {self.path} is {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"sensitivity.path: cannot read {self.path} ({error})") from error

    def measure(
        self, model: nn.Module, layers: Sequence[LayerInfo], conditions: Conditions
    ) -> Iterator[LayerSensitivity]:
        """Reads the rows of the model's layers; see :class:`~.base.SensitivityMetric`.

        Raises:
            UserError: A layer or a bit-width is not in the file, or a layer is another one.
        """
        bit_widths = conditions.bit_widths
        rows = {row.name: row for row in self.table().layers}
        problems = [problem for x in layers if (problem := _problem(x, rows, bit_widths))]
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"sensitivity.path: {self.path} does not cover this model: "
                f"{'; '.join(problems[:3])}{more}; measure it anew with this model and "
                f"bits.candidates={list(bit_widths)}"
            )
        for info in layers:
            row = rows[info.name]
            inputs = row.activation_sensitivity
            yield LayerSensitivity(
                info.name,
                info.num_weights,
                info.macs,
                {bits: row.sensitivity[bits] for bits in bit_widths},
                None if inputs is None else {bits: inputs[bits] for bits in bit_widths},
            )


def _problem(
    info: LayerInfo, rows: dict[str, LayerSensitivity], bit_widths: Sequence[int]
) -> str | None:
    """What a file lacks for one layer, or None."""
    row = rows.get(info.name)
    if row is None:
        return f"it has no layer {info.name}"
    if row.num_weights != info.num_weights:
        return f"layer {info.name} has {row.num_weights} weights there, {info.num_weights} here"
    for what, values in row.by_tensors():
        missing = [str(bits) for bits in bit_widths if bits not in values]
        if missing:
            return f"{what} {info.name} has no value at {', '.join(missing)} bits"
    return None
