"""Frozen values read from JSON: every field of its type and within its range, or named."""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, NamedTuple


class Within(NamedTuple):
    """The values that a number may have, in its type as ``Annotated[int, Within(0)]``."""

    minimum: float
    maximum: float = math.inf

    def __str__(self) -> str:
        if self.maximum == math.inf:
            return f"at least {self.minimum:g}"
        return f"{self.minimum:g} … {self.maximum:g}"


def strict_json(text: str | bytes) -> Any:
    """JSON without NaN, infinity or a name that is there twice.

    Raises:
        ValueError: It is something else, or has numbers too large for a float.
    """

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(f"{number} is not a finite number")
        return float(number)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name!r} is there twice")
            found[name] = value
        return found

    return json.loads(text, parse_float=finite, parse_constant=finite, object_pairs_hook=once)


def decode(kind: Any, value: Any, where: str = "") -> Any:
    """A value of the given type.

    Fields that the type does not have are left out; one that is not there takes its default.

    Args:
        kind: A dataclass, ``bool``, ``int``, ``float``, ``str``, ``X | None``, ``tuple[X, ...]``,
            ``dict[str, X]`` or ``dict[int, X]``, and ``Annotated[X, Within(…)]``.
        value: As :func:`json.loads` gave it.
        where: The name of the field.

    Raises:
        ValueError: Names the field, and what it holds.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        number = decode(arguments[0], value, where)
        if not arguments[1].minimum <= number <= arguments[1].maximum:
            raise ValueError(f"{where} is {value!r}; it must be {arguments[1]}")
        return number
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        (kind,) = (x for x in arguments if x is not types.NoneType)
        return decode(kind, value, where)
    if origin is tuple:
        items = _of(list, value, where, "a list")
        return tuple(decode(arguments[0], x, _item(where, i, x)) for i, x in enumerate(items))
    if origin is dict:
        items = _of(dict, value, where, "an object").items()
        return {
            _key(arguments[0], k, where): decode(arguments[1], x, f"{where}.{k}") for k, x in items
        }
    if is_dataclass(kind):
        return _decode_fields(kind, _of(dict, value, where, "an object"), where)
    if kind is float:
        number = _of(int | float, value, where, "a number")
        try:
            return float(number)
        except OverflowError as error:
            raise ValueError(f"{where} is too large a number") from error
    names = {bool: "true or false", int: "a whole number", str: "a text"}
    return _of(kind, value, where, names[kind])


def _decode_fields(kind: Any, content: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {}
    for field in fields(kind):
        name = f"{where}.{field.name}".lstrip(".")
        if field.name in content:
            values[field.name] = decode(hints[field.name], content[field.name], name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} is missing")
    return kind(**values)


def _of(kind: Any, value: Any, where: str, what: str) -> Any:
    # A bool is an int to Python, and not to JSON.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
        raise ValueError(f"{where or 'it'} is {shown}, not {what}")
    return value


def _item(where: str, index: int, value: Any) -> str:
    """Where a list's item is; by its name where it has one."""
    name = value.get("name") if isinstance(value, dict) else None
    return f"{where}[{index}] ({name})" if isinstance(name, str) else f"{where}[{index}]"


def _key(kind: Any, key: str, where: str) -> Any:
    if kind is str:
        return key
    if not (key.isascii() and key.isdigit() and str(int(key)) == key):
        raise ValueError(f"{where} has the key {key!r}, not a whole number")
    return int(key)
