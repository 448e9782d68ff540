"""``key=value`` on the command line of the small programs, without Hydra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from adq_train.errors import ConfigError, did_you_mean

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str]) -> T:
    """Settings from ``PATH`` and ``key=value`` arguments.

    Args:
        kind: A dataclass whose first field is the path. Fields are str, bool, int, float or a
            tuple of names by their default; one of type dict takes the settings ``name.key=value``.
        arguments: The command line.

    Raises:
        ConfigError: Lists every problem.
    """
    known: dict[str, Any] = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    path_name = next(iter(known))
    values: dict[str, Any] = {}
    problems = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        group, dot, inner = key.partition(".")
        # The folders of runs are named by settings, with equals signs.
        path_like = not equals or "/" in key or Path(argument).exists()
        if path_like and path_name not in values:
            values[path_name] = argument
        elif not equals:
            problems.append(f"{argument!r} is neither the path nor of the form key=value")
        elif dot and equals and f"{group}_changes" in known:
            values.setdefault(f"{group}_changes", {})[inner] = text
        elif key not in known or key == path_name or key.endswith("_changes"):
            names = [x for x in known if x != path_name and not x.endswith("_changes")]
            hint = did_you_mean(key, names) or f"; there are {', '.join(names)}"
            problems.append(f"{key}: there is no such setting{hint}")
        else:
            try:
                values[key] = _value(known[key], text)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    if path_name not in values:
        problems.append(f"{path_name}: give the path first; --help shows how")
    if problems:
        raise ConfigError(problems)
    return kind(**values)


def _value(field: Any, text: str) -> Any:
    """A setting's value from its text, checked."""
    choices = field.metadata.get("choices")
    if choices and text not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}, got {text!r}")
    if isinstance(field.default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"must be true or false, got {text!r}")
        return text.lower() == "true"
    if isinstance(field.default, int):
        allowed = field.metadata["range"]
        if not text.isdecimal() or allowed.problem(int(text)):
            raise ValueError(f"must be a whole number, {allowed}, got {text!r}")
        return int(text)
    if isinstance(field.default, float):
        allowed = field.metadata["range"]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if allowed.problem(value):
            raise ValueError(f"must be a number, {allowed}, got {text!r}")
        return value
    if isinstance(field.default, tuple):
        names = tuple(x.strip() for x in text.strip("[]").split(",") if x.strip())
        if wrong := [x for x in names if not all(part.isidentifier() for part in x.split("."))]:
            raise ValueError(f"must be a list of names, [a,b], got {wrong[0]!r} in it")
        return names
    return text
