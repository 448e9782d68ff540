"""What is wrong with the values of a section, by what is declared of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adq_train.errors import did_you_mean
from adq_train.settings.ranges import leaves
from adq_train.settings.schema import SECTIONS, Config, about
from adq_train.shares import share


def section_problems(section: str, values: dict[str, Any]) -> Iterator[str]:
    """Names, ranges and choices of a section, and lists of bits that do not fit one another.

    Args:
        section: ``bits``, …; empty: what stands outside of sections.
        values: As in ``config.yaml``.
    """
    settings = about(SECTIONS[section] if section else Config)
    for name in values.keys() - settings.keys():
        prefix = f"{section}.{name}".strip(".")
        yield f"{prefix}: there is no such setting{did_you_mean(name, settings)}"
    for setting, declared in settings.items():
        name, value = f"{section}.{setting}".strip("."), values.get(setting)
        allowed = declared.range
        for _, number in leaves(value) if allowed else ():
            if isinstance(number, str) and declared.share_of:
                try:
                    share(number, declared.share_of)
                except ValueError as error:
                    yield f"{name}: {error}"
            elif isinstance(number, str | bool):
                yield f"{name}: must be a number, got {number!r}"
            elif allowed and number is not None and (wrong := allowed.problem(number)):
                yield f"{name}: {wrong}"
        words = value if isinstance(value, list) else [value]
        if declared.choices and not set(words) <= set(declared.choices):
            yield f"{name}: must be one of {', '.join(declared.choices)}, got {value!r}"
    if section == "bits":
        yield from _bits_problems(values)


def _bits_problems(bits: dict[str, Any]) -> Iterator[str]:
    """Pins that are no map of bits, and candidates."""
    pinned = bits["pinned"]
    if isinstance(pinned, dict):
        for pattern, width in pinned.items():
            if type(width) is not int:
                yield f"bits.pinned.{pattern}: must be a whole number of bits, got {width!r}"
    elif pinned is not None:
        yield f"bits.pinned: must map layer names to bits, {{fc: 4}}, got {pinned!r}"
    yield from _candidate_problems(bits["candidates"], bits["candidates_per_layer"])


def _candidate_problems(candidates: list[int], per_layer: Any) -> Iterator[str]:
    """Lists of bit-widths that are out of order, and widths that would not be measured."""
    rule = "must be ascending and distinct, at least one"
    if not all(type(b) is int for b in candidates):
        yield f"bits.candidates: must be a list of bits, [2, 4], got {candidates}"
        return
    if not candidates or sorted(set(candidates)) != candidates:
        yield f"bits.candidates: {rule}, got {candidates}"
    if not isinstance(per_layer, dict | None):
        yield (
            "bits.candidates_per_layer: must map layer names to lists of bits, {fc: [4, 8]}, got "
            f"{per_layer!r}"
        )
        return
    for pattern, widths in (per_layer or {}).items():
        name = f"bits.candidates_per_layer.{pattern}"
        if not isinstance(widths, list) or not all(type(b) is int for b in widths):
            yield f"{name}: must be a list of bits, [2, 4], got {widths!r}"
        elif not widths or sorted(set(widths)) != widths:
            yield f"{name}: {rule}, got {widths}"
        elif not set(widths) <= set(candidates):
            more = sorted({*widths, *candidates})
            yield (
                f"{name}: {widths} must be among bits.candidates, which are measured; set "
                f"bits.candidates={more}"
            )
