"""``key=value`` on the command line of the small programs, without Hydra."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf._utils import get_yaml_loader

from adq_train.errors import ConfigError, did_you_mean
from adq_train.settings.schema import About

T = TypeVar("T")


def read(kind: type[T], text: str) -> T:
    """Settings from the command line; where it asks for help, or is empty, prints it and exits.

    Args:
        kind: As of :func:`parse`.
        text: The help.

    Raises:
        ConfigError: Lists every problem.
    """
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(text, end="")
        sys.exit(0 if arguments else 2)
    return parse(kind, arguments)


def parse(kind: type[T], arguments: Sequence[str]) -> T:
    """Settings from ``PATH`` and ``key=value`` arguments.

    Args:
        kind: A dataclass whose first field is the path, or a tuple of paths, by its type. Fields
            are str, bool, int, float or a tuple of names by their default; one of type dict takes
            the settings ``name.key=value``.
        arguments: The command line.

    Raises:
        ConfigError: Lists every problem.
    """
    known: dict[str, Any] = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    path_name = next(iter(known))
    paths: list[str] = []
    several = str(known[path_name].type).startswith("tuple")
    values: dict[str, Any] = {}
    problems = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        group, dot, inner = key.partition(".")
        # The folders of runs are named by settings, with equals signs.
        path_like = not equals or "/" in key or Path(argument).exists()
        if argument.startswith("--"):
            problems.append(f"{argument}: {without_dashes(argument)}")
        elif path_like and (several or not paths):
            paths.append(argument)
        elif not equals:
            how = f"; write {argument}=VALUE" if argument in known else ""
            problems.append(f"{argument!r} is neither the path nor of the form key=value{how}")
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
    if not paths:
        problems.append(f"{path_name}: give the path first; --help shows how")
    if problems:
        raise ConfigError(problems)
    return kind(**{path_name: tuple(paths) if several else paths[0]}, **values)


def without_dashes(flag: str) -> str:
    """How what was typed as a flag is written as a setting."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    return f"a setting is written {name}=VALUE, without dashes"


def values_of(changes: Mapping[str, str]) -> dict[str, Any]:
    """The values of settings that were given as text, in YAML.

    Raises:
        ConfigError: One cannot be read.
    """
    found = {}
    for name, text in changes.items():
        try:
            found[name] = yaml.load(text, get_yaml_loader())
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ConfigError([f"{name}: {text!r} cannot be read ({reason})"]) from error
    return found


def _value(field: Any, text: str) -> Any:
    """A setting's value from its text, checked."""
    about: About = field.metadata.get("about", About(""))
    if about.choices and text not in about.choices:
        raise ValueError(f"must be one of {', '.join(about.choices)}, got {text!r}")
    if isinstance(field.default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"must be true or false, got {text!r}")
        return text.lower() == "true"
    if isinstance(field.default, int):
        if not text.isdecimal() or (about.range and about.range.problem(int(text))):
            raise ValueError(f"must be a whole number, {about.range}, got {text!r}")
        return int(text)
    if isinstance(field.default, float):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if about.range and about.range.problem(value):
            raise ValueError(f"must be a number, {about.range}, got {text!r}")
        return value
    if isinstance(field.default, tuple):
        names = tuple(x.strip() for x in text.strip("[]").split(",") if x.strip())
        if wrong := [x for x in names if not all(part.isidentifier() for part in x.split("."))]:
            raise ValueError(f"must be a list of names, [a,b], got {wrong[0]!r} in it")
        return names
    return text
