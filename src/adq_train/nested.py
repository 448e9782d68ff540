"""Tensors in nested containers, as batches and results of networks have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor

Path = tuple[Callable[[Any], Any], ...]  # from a value to one of its tensors


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in nested mappings, lists, tuples and dataclasses, with the way to each."""
    steps: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        steps = [(itemgetter(name), x) for name, x in value.items()]
    elif isinstance(value, tuple | list):
        steps = [(itemgetter(place), x) for place, x in enumerate(value)]
    elif is_dataclass(value):
        steps = [(attrgetter(f.name), getattr(value, f.name)) for f in fields(value)]
    for step, x in steps:
        yield from tensors(x, (*path, step))


def followed(path: Path, value: Any) -> Any:
    """The tensor at the end of a path."""
    for step in path:
        value = step(value)
    return value


def length(value: Any) -> int:
    """The first axis of the first tensor in a value that has one; 1 where none has."""
    return next((len(x) for _, x in tensors(value) if x.dim()), 1)


def entries(value: Any, which: Any) -> Any:
    """Some entries of every tensor in a value, by index or slice."""
    return mapped(lambda x: x[which], value)


def few(value: Any, count: int) -> Any:
    """The first entries of a tensor; another value whole, as its axes are not known."""
    return value[:count] if isinstance(value, Tensor) else value


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Nested mappings, lists and tuples with every tensor changed; all else stays."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(change, x) for name, x in value.items()}
    if isinstance(value, tuple | list):
        parts = [mapped(change, x) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
