"""The values that a number may take, and those of nested settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The values that a number may take; ``above`` and ``below`` are exclusive bounds."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with ``value``, or None when it lies in the range."""
        inside = (
            not math.isnan(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        return None if inside else f"must be {self}, got {value}"

    def __str__(self) -> str:
        parts = [
            f"{word} {bound if isinstance(bound, int) else format(bound, 'g')}"
            for word, bound in (
                ("at least", self.minimum),
                ("more than", self.above),
                ("at most", self.maximum),
                ("less than", self.below),
            )
            if bound is not None
        ]
        return " and ".join(parts)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries and lists, with their dotted names."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}".strip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, node
