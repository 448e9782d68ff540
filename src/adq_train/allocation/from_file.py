"""The bits of another run, of another tool, or written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adq_train.allocation.allocator import GivenAllocator
from adq_train.allocation.budget import Bits, Problem
from adq_train.allocation.fixed import require_within
from adq_train.allocation.patterns import listed
from adq_train.artifacts import layer_bits
from adq_train.errors import UserError


@dataclass(frozen=True)
class FileAllocator(GivenAllocator):
    """The bits in an ``allocation.json``; any from 2 to 8, also such as were not measured.

    Of the file only ``layers`` is read; every figure is counted anew.

    Attributes:
        path: The file.
    """

    path: str

    def __post_init__(self) -> None:
        try:
            self._read()
        except UserError as error:
            raise ValueError(f"path: {error}") from error

    @property
    def name(self) -> str:
        """The allocator's name in ``allocation.json``."""
        return "from_file"

    def _read(self) -> dict[str, Bits]:
        """The bits in the file, by layer."""
        try:
            text = Path(self.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} cannot be read ({error})") from error
        try:
            layers = layer_bits(text)
        except UserError as error:
            raise UserError(f"{self.path} is {error}") from error
        return {x.name: Bits(x.weight_bits, x.activation_bits) for x in layers}

    def bits_for(self, problem: Problem) -> dict[str, Bits]:
        """Bits of every mixed layer by name.

        Raises:
            UserError: The file does not fit the model, the pins or the budget.
        """
        given, names = self._read(), [x.name for x in problem.layers]
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
