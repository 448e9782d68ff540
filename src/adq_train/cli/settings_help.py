"""``adq-train --settings``: every setting with its default, its range and what it changes."""

from __future__ import annotations

import importlib.resources
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from adq_train.errors import ConfigError, did_you_mean
from adq_train.settings.schema import GROUPS, SECTIONS, About, Affects, Config, about

WIDTH = 80
CHANGES = {
    Affects.NOTHING: "changes where or how a run goes",
    Affects.ROUNDING: "changes speed and rounding",
    Affects.RESULT: "changes the result",
    Affects.FLOAT_MODEL: "changes the float model and the result",
}


def settings_text(section: str | None = None) -> str:
    """The settings of one section (``trainer``), or of all.

    Raises:
        ConfigError: There is no such section.
    """
    known = {"general": Config, **SECTIONS}
    if section is not None and section not in known:
        hint = did_you_mean(section, known) or f"; choose from {', '.join(known)}"
        if section in GROUPS:
            hint = f"; it is a group, whose settings adq-train --cfg job {section}=CHOICE shows"
        raise ConfigError([f"--settings: there is no section {section}{hint}"])
    chosen = known if section is None else {section: known[section]}
    own = _configured()
    lines = [line for name, of in chosen.items() for line in _section(name, of, own.get(name, {}))]
    more = "Settings of groups (data, model, optimizer …): adq-train --cfg job GROUP=CHOICE"
    return "\n".join([*lines, more])


def _section(name: str, of: Any, configured: dict[str, Any]) -> Iterator[str]:
    yield from textwrap.wrap(f"{name}: {(of.__doc__ or '').splitlines()[0]}", WIDTH)
    prefix = "" if of is Config else f"{name}."
    defaults = vars(of()) | configured
    for setting, what in about(of).items():
        if of is Config and setting in (*GROUPS, *SECTIONS):
            continue
        yield f"  {prefix}{setting}={_written(defaults[setting])}"
        text = f"{what.help} ({'; '.join(_facts(what))})"
        yield from textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ")
    yield ""


def _configured() -> dict[str, dict[str, Any]]:
    """The sections for which config.yaml has defaults of its own."""
    file = importlib.resources.files("adq_train.configs") / "config.yaml"
    found: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def _facts(what: About) -> Iterator[str]:
    if what.choices:
        yield f"one of {', '.join(what.choices)}"
    if what.range is not None:
        yield str(what.range)
    yield CHANGES[what.affects]


def _written(value: object) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return str(value).replace(" ", "")
