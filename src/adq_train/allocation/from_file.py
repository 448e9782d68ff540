"""The bits of another run, of another tool, or written by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adq_train.allocation.allocator import GivenAllocator
from adq_train.allocation.budget import Bits, Problem, figures
from adq_train.allocation.fixed import require_within
from adq_train.allocation.patterns import listed
from adq_train.artifacts import SensitivityTable, layer_bits
from adq_train.errors import UserError

log = logging.getLogger(__name__)

# A figure with two digits after the point is as good as the whole one.
ROUNDED = 0.005 + 1e-9


@dataclass(frozen=True)
class FileAllocator(GivenAllocator):
    """The bits in an ``allocation.json``; any from 2 to 8, also such as were not measured.

    Of the file only ``layers`` decides; every figure is counted anew, and one that the file states
    otherwise is told in the log.

    Attributes:
        path: The file.
    """

    name = "from_file"
    path: str

    def __post_init__(self) -> None:
        try:
            _ = self.content
        except UserError as error:
            raise ValueError(f"path: {error}") from error

    @cached_property
    def content(self) -> tuple[dict[str, Bits], dict[str, Any]]:
        """The bits in the file, by layer, and all that it says; read once.

        Raises:
            UserError: It cannot be read, or is something else.
        """
        try:
            text = Path(self.path).read_text(encoding="utf-8")
            layers = layer_bits(text)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} cannot be read ({error})") from error
        except UserError as error:
            raise UserError(f"{self.path} is {error}") from error
        bits = {x.name: Bits(x.weight_bits, x.activation_bits) for x in layers}
        return bits, json.loads(text)

    def bits_for(self, problem: Problem) -> dict[str, Bits]:
        """Bits of every mixed layer by name.

        Raises:
            UserError: The file does not fit the model, the pins or the budget.
        """
        given, names = self.content[0], [x.name for x in problem.layers]
        missing = [name for name in names if name not in given]
        extra = [name for name in given if name not in names]
        if missing or extra:
            parts = [
                f"{what} {listed(some)}"
                for what, some in (("lacks", missing), ("has besides", extra))
                if some
            ]
            raise UserError(
                f"allocator.path: {self.path} is of another model: it {' and '.join(parts)}"
            )
        for name, bits in problem.pinned_bits().items():
            if given[name] != bits:
                raise UserError(
                    f"allocator.path: {self.path} gives {name} {given[name].weights} weight and "
                    f"{given[name].activations} activation bits, but it is pinned to "
                    f"{bits.weights}; change bits.first_last, bits.pinned or the file"
                )
        chosen = {x.name: given[x.name] for x in problem.mixed}
        require_within(problem, chosen, f"allocator.path: {self.path}")
        return chosen

    def choose(self, problem: Problem, table: SensitivityTable) -> tuple[dict[str, Bits], bool]:
        """Bits of every mixed layer by name; never proven optimal.

        Raises:
            UserError: They do not fit.
        """
        chosen, optimal = super().choose(problem, table)
        bits = {**chosen, **problem.pinned_bits()}
        counted = asdict(figures(problem.layers, bits, problem.pinned))
        if odd := other_figures(self.content[1], counted):
            log.warning("allocator.path: %s states %s; its layers count", self.path, odd)
        return chosen, optimal


def other_figures(stated: Mapping[str, Any], counted: Mapping[str, float]) -> str | None:
    """The figures that a file states and its bits do not come to, as one phrase, or None.

    Args:
        stated: What the file says; a number may be rounded to two digits after the point.
        counted: The figures of its bits, by name.
    """
    odd = [
        f"{name} {stated[name]}, but its bits come to {value:.10g}"
        for name, value in counted.items()
        if name in stated and not _is_about(stated[name], value)
    ]
    return "; ".join(odd) or None


def _is_about(stated: Any, value: float) -> bool:
    is_number = isinstance(stated, int | float) and not isinstance(stated, bool)
    return is_number and abs(stated - value) <= ROUNDED
