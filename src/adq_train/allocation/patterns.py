"""Settings that name layers by shell patterns: which layer each of them means."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

from adq_train.artifacts import LayerInfo
from adq_train.errors import UserError

V = TypeVar("V")
MOST_NAMES = 10
EMBEDDING_BITS = 8


def match(setting: str, patterns: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """The one pattern that means each layer; layers that none means are left out.

    Args:
        setting: Name of the setting, for messages.
        patterns: Layer names, or shell patterns: ``layer3.*``.
        names: The layers' names.

    Raises:
        UserError: A pattern matches no layer, or a layer is matched twice.
    """
    by_name: dict[str, str] = {}
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise UserError(f"{setting}: no layer is called {pattern!r}{near(pattern, names)}")
        for name in matched:
            if name in by_name:
                raise UserError(
                    f"{setting}: {by_name[name]!r} and {pattern!r} both match {name}; keep one"
                )
            by_name[name] = pattern
    return by_name


def near(word: str, names: Sequence[str]) -> str:
    """The names most like a word, or else all of them, as the end of a message."""
    found = get_close_matches(word, names, n=3, cutoff=0.6)
    if found:
        return f" (did you mean {' or '.join(map(repr, found))}?)"
    return f"; the layers are {listed(names)}"


def listed(names: Collection[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(list(names)[:MOST_NAMES]) + more


def by_layer(setting: str, values: Mapping[str, V], layers: Sequence[LayerInfo]) -> dict[str, V]:
    """Values by layer name, from values by pattern.

    Args:
        setting: Name of the setting, for messages.
        values: By layer name or shell pattern.
        layers: All quantizable layers.

    Raises:
        UserError: A pattern matches no layer, or a layer is matched twice.
    """
    matched = match(setting, values, [x.name for x in layers])
    return {name: values[pattern] for name, pattern in matched.items()}


def pinned_bits(
    layers: Sequence[LayerInfo], first_last: int | None, given: Mapping[str, int]
) -> dict[str, int]:
    """The layers whose bits are not to be chosen.

    Args:
        layers: All quantizable layers, in the order of execution.
        first_last: Bits of the first and the last layer that compute, or None.
        given: Bits by layer name or shell pattern; they win.

    Returns:
        By name. Embeddings, which multiply nothing, have :data:`EMBEDDING_BITS`.

    Raises:
        UserError: A pattern matches no layer, or a layer is matched twice.
    """
    computing = [x for x in layers if x.macs]
    ends = {x.name: first_last for x in (computing[:1] + computing[-1:])} if first_last else {}
    embeddings = {x.name: EMBEDDING_BITS for x in layers if not x.macs}
    pinned = {**ends, **embeddings, **by_layer("bits.pinned", given, layers)}
    return {x.name: pinned[x.name] for x in layers if x.name in pinned}
