"""Checks the command line before Hydra does, so that all its errors are told at once.

Hydra stops at the first override that it cannot apply, and does not suggest a name. Imports
nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adq_train.errors import did_you_mean
from adq_train.schema import register


def problems_of(overrides: Sequence[str], search_path: str | None = None) -> list[str]:
    """One sentence for each override that cannot be applied.

    Args:
        overrides: The command line without Hydra's flags.
        search_path: A folder with more configs (``--config-dir``).
    """
    register()
    problems: list[str] = []
    with initialize_config_module("adq_train.configs", version_base="1.3", job_name="adq-train"):
        loader = GlobalHydra.instance().config_loader()
        parsed: list[Override] = []
        for text in overrides:
            try:
                parsed.append(OverridesParser.create().parse_override(text))
            except HydraException as error:
                reason = str(error).splitlines()[0]
                problems.append(f"{text!r} is not of the form key=value ({reason})")
        groups = [""] + [g for g in loader.list_groups("") if not g.startswith("hydra")]
        chosen = [f"hydra.searchpath=[file://{Path(search_path).resolve()}]"] if search_path else []
        values: list[Override] = []
        for override in parsed:
            key = override.key_or_group
            if key.startswith("hydra"):
                continue
            options = loader.get_group_options(key) if key in groups and key else []
            if options and search_path:
                options += [file.stem for file in Path(search_path, key).glob("*.yaml")]
            if not options:
                values.append(override)
                continue
            wrong = [str(v) for v in _choices(override) if str(v) not in options]
            problems += [
                f"{key}={value}: there is no such choice{did_you_mean(value, options)}; "
                f"choose from {', '.join(sorted(options))}"
                for value in wrong
            ]
            if not wrong:
                chosen.append(f"{key}={_choices(override)[0]}")
        try:
            cfg = compose("config", chosen)
        except HydraException as error:
            return [*problems, str(error).splitlines()[0]]
        known = [*_keys(cfg), *groups[1:]]
        for override in values:
            problems += _value_problems(cfg, override, known)
        if not problems and any(_is_rare(override) for override in parsed):
            texts = [
                override.input_line or ""
                for override in parsed
                if not override.is_sweep_override()
                and not override.key_or_group.startswith("hydra")
            ]
            try:
                compose("config", [*chosen[: 1 if search_path else 0], *texts])
            except (HydraException, OmegaConfBaseException) as error:
                problems.append(" ".join(str(error).splitlines()[:1]))
    return problems


def _is_rare(override: Override) -> bool:
    """Whether an override adds or deletes, which Hydra judges as a whole."""
    return override.is_add() or override.is_force_add() or override.is_delete()


def _choices(override: Override) -> list[Any]:
    """The values that an override stands for: one, or all of a sweep."""
    value = override.value()
    if override.is_sweep_override() and isinstance(value, Sweep):
        return list(override.sweep_iterator())
    return value if isinstance(value, list) and override.is_sweep_override() else [value]


def _keys(node: DictConfig, path: str = "") -> Iterator[str]:
    """All names of a configuration, sections included."""
    for key in node:
        name = f"{path}.{key!s}".strip(".")
        yield name
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing()):
            yield from _keys(child, name)


def _value_problems(cfg: DictConfig, override: Override, known: Sequence[str]) -> Iterator[str]:
    """What is wrong with an override of a single value."""
    key = override.key_or_group
    if not override.is_add() and key not in known:
        yield f"{key}: there is no such setting{did_you_mean(key, known)}"
        return
    if _is_rare(override):
        return  # Hydra and the signature check of the group look at these
    for value in _choices(override):
        trial = cfg.copy()
        try:
            OmegaConf.update(trial, key, value)
        except OmegaConfBaseException as error:
            yield f"{key}: {str(error).splitlines()[0]}"
