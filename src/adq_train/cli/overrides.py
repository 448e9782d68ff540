"""Checks the command line before Hydra does, so that all its errors are told at once.

Hydra stops at the first override that it cannot apply, and does not suggest a name. Imports
nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, QuotedString, Sweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from adq_train.cli.sources import composed, composing, interpolation_problems
from adq_train.cli.sources import of_hydra as hydra_section
from adq_train.cli.values import how_to_write, parse
from adq_train.errors import ConfigError, did_you_mean, first_line
from adq_train.settings.schema import GROUPS

# What a command line may say to Hydra. Its other settings are of what adq-train does itself.
LAUNCHERS = ("basic", "slurm")
OF_HYDRA = ("hydra.mode", "hydra.sweeper.params", "hydra/launcher", "hydra.launcher")


@dataclass(frozen=True)
class CommandLine:
    """What overrides come to, all together.

    Attributes:
        problems: One sentence for each override that cannot be applied.
        is_sweep: Whether they ask for several runs.
        params: What the configuration sweeps over besides.
    """

    problems: tuple[str, ...]
    is_sweep: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)


def examine(
    overrides: Sequence[str], search_path: str | None = None, sweep: bool = False
) -> CommandLine:
    """Looks at every override without running anything.

    Args:
        overrides: The command line without Hydra's flags.
        search_path: A folder with more configs (``--config-dir``).
        sweep: Whether a setting may have several values.
    """
    if search_path and not Path(search_path).is_dir():
        return CommandLine((f"--config-dir: there is no folder {search_path}",))
    if spaced := [text for text in overrides if text.startswith("=")]:
        return CommandLine((f"{spaced[0]!r}: write setting=value, without spaces around =",))
    problems: list[str] = []
    with composing(search_path) as compose:
        loader = GlobalHydra.instance().config_loader()
        parsed: list[Override] = []
        for text in overrides:
            try:
                parsed.append(parse(text))
            except HydraException:
                problems.append(_unreadable(text, loader))
        problems += [_no_launcher(x.value()) for x in parsed if _is_other_launcher(x)]
        parsed = [x for x in parsed if not _is_other_launcher(x)]
        groups = [""] + [g for g in loader.list_groups("") if not g.startswith("hydra")]
        choices, values, of_hydra, wrong = _sorted(parsed, loader, groups, search_path)
        problems += wrong
        # The first of each, then each of the others once: every file is seen.
        first = [texts[0] for texts in choices]
        others = [
            [text if one.split("=")[0] == text.split("=")[0] else one for one in first]
            for texts in choices
            for text in texts[1:]
        ]
        try:
            own = hydra_section(composed(of_hydra)) if search_path else None
            cfgs = []
            for selection in (first, *others):
                cfg = compose([*selection, *of_hydra])
                cfgs.append(cfg)
                problems += interpolation_problems(cfg)
                if own is not None and (more := list(_hydra_changes(own, hydra_section(cfg)))):
                    problems.append(
                        f"hydra.{more[0]}: set by a file below {search_path}; only the command "
                        "line may say what Hydra does, apart from hydra.mode and "
                        "hydra.sweeper.params"
                    )
                sweep = sweep or cfg.hydra.mode == RunMode.MULTIRUN
        except ConfigError as error:
            return CommandLine((*problems, *error.problems))
        cfg = cfgs[0]
        params = dict(cfg.hydra.sweeper.params or {})
        with open_dict(cfg):
            del cfg["hydra"]
        known = [*_keys(cfg), *groups[1:]]
        ambiguous = [x for x in parsed if x.is_sweep_override() and not sweep]
        for override in values:
            problems += _value_problems(cfg, override, known, judged=override not in ambiguous)
        problems += map(_ambiguous, ambiguous)
        if not problems and any(_is_rare(override) for override in parsed):
            problems += _as_a_whole(compose, parsed)
    return CommandLine(tuple(dict.fromkeys(problems)), sweep, params)


def _is_other_launcher(override: Override) -> bool:
    return override.key_or_group == "hydra/launcher" and override.value() not in LAUNCHERS


def _no_launcher(value: object) -> str:
    return f"hydra/launcher: must be {' or '.join(LAUNCHERS)}, got {value!r}"


def _as_a_whole(
    compose: Callable[[Sequence[str]], DictConfig], parsed: Sequence[Override]
) -> tuple[str, ...]:
    """What is wrong with all overrides together, without those of a sweep."""
    texts = [
        override.input_line or ""
        for override in parsed
        if not override.is_sweep_override() and not override.key_or_group.startswith("hydra")
    ]
    try:
        compose(texts)
    except ConfigError as error:
        return tuple(error.problems)
    return ()


def _sorted(
    parsed: Sequence[Override], loader: Any, groups: Sequence[str], search_path: str | None
) -> tuple[list[list[str]], list[Override], list[str], list[str]]:
    """Overrides by what they set: choices of groups, values, Hydra's own; and what is wrong.

    Args:
        parsed: The command line.
        loader: Knows the files of each group.
        groups: Their names.
        search_path: A folder with more of them.
    """
    problems: list[str] = []
    choices: list[list[str]] = []
    values: list[Override] = []
    of_hydra: list[str] = []
    for override in parsed:
        key = override.key_or_group
        if key == "hydra.searchpath":
            problems.append(f"{key}: cannot be set; give the folder as --config-dir")
            continue
        if key.startswith("hydra"):
            of_hydra.append(override.input_line or "")
            if not key.startswith(OF_HYDRA):
                problems.append(f"{key}: is not read; of Hydra there are {', '.join(OF_HYDRA)}")
            continue
        if override.is_sweep_override() and not override.is_discrete_sweep():
            problems.append(f"{override.input_line}: a sweep is a list, a,b,c, or range(0,3)")
            continue
        options = loader.get_group_options(key) if key in groups and key else []
        if options and search_path:
            options += [file.stem for file in Path(search_path, key).glob("*.yaml")]
        if not options:
            values.append(override)
            continue
        wrong = [str(v) for v in _choices(override) if str(v) not in options]
        own = (
            "" if search_path else f", or give --config-dir=<folder> with {key}/<choice>.yaml in it"
        )
        problems += [
            f"{key}={value}: there is no such choice{did_you_mean(value, options)}; "
            f"choose from {', '.join(sorted(options))}{own}"
            for value in wrong
        ]
        if not wrong:
            choices.append([f"{key}={value}" for value in _choices(override)])
    return choices, values, of_hydra, problems


def trust_typed(overrides: Sequence[str]) -> list[str]:
    """The packages that a command line trusts.

    Raises:
        ConfigError: They are not spelled out there.
    """
    names: list[str] = []
    for override in map(parse, overrides):
        if override.key_or_group.split(".")[0] == "trusted_packages":
            value = override.value()
            names = value if type(value) is list else [""]
            if not all(isinstance(x, str) and re.fullmatch(r"\w+(\.\w+)*", x) for x in names):
                raise ConfigError(
                    ["trusted_packages: must be names of packages, trusted_packages=[mine]"]
                )
    return names


def _unreadable(text: str, loader: Any) -> str:
    """What is wrong with an override that Hydra's grammar refuses, and how to write it.

    Args:
        text: The override.
        loader: Knows the groups and their choices.
    """
    key, equals, value = text.partition("=")
    if not equals:
        groups = [x for x in loader.list_groups("") if text in loader.get_group_options(x)]
        meant = " or ".join(f"{x}={text}" for x in groups) or f"{text}=VALUE"
        return f"{text!r} is not of the form key=value; write {meant}"
    open_ones = [a for a, b in ("[]", "{}", "()") if value.count(a) != value.count(b)]
    reason = f"; a bracket {open_ones[0]} is not closed" if open_ones else ""
    how = f"; one text is written {how_to_write(key, value)}" if value and not open_ones else ""
    return f"{key}: cannot read {value!r}{reason}{how}"


def _ambiguous(override: Override) -> str:
    """Several values where one run is asked for."""
    key, _, value = (override.input_line or "").partition("=")
    return (
        f"{key}={value}: several values are a sweep, which needs -m; a value with a comma is "
        f"written {how_to_write(key, value)}, a list {key}=[{value}]"
    )


def _hydra_changes(own: Any, now: Any, path: str = "") -> Iterator[str]:
    """The names of settings that differ."""
    if isinstance(own, dict) and isinstance(now, dict):
        for key in [*own, *(key for key in now if key not in own)]:
            yield from _hydra_changes(own.get(key), now.get(key), f"{path}.{key}".strip("."))
    elif own != now:
        yield path


def _is_rare(override: Override) -> bool:
    """Whether an override adds or deletes, which Hydra judges as a whole."""
    return override.is_add() or override.is_force_add() or override.is_delete()


def _choices(override: Override) -> list[Any]:
    """The values that an override stands for: one, or all of a sweep."""
    value = override.value()
    if override.is_sweep_override() and isinstance(value, Sweep):
        return [x.text if isinstance(x, QuotedString) else x for x in override.sweep_iterator()]
    return value if isinstance(value, list) and override.is_sweep_override() else [value]


def _keys(node: DictConfig, path: str = "") -> Iterator[str]:
    """All names of a configuration, sections included."""
    for key in node:
        name = f"{path}.{key!s}".strip(".")
        yield name
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing()):
            yield from _keys(child, name)


KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def _plainly(reason: str, value: Any) -> str:
    """What OmegaConf says of a value of another type, in the words of all other messages."""
    if found := re.search(r"could not be converted to (\w+)|is not a valid (\w+)", reason):
        kind = (found[1] or found[2]).capitalize()
        return f"must be {KINDS.get(kind, kind)}, got {value!r}"
    if "is not a ListConfig" in reason:
        return f"must be a list, such as [2,3], got {value!r}"
    return reason


def _value_problems(
    cfg: DictConfig, override: Override, known: Sequence[str], judged: bool = True
) -> Iterator[str]:
    """What is wrong with an override of a single value.

    Args:
        cfg: What it changes.
        override: One setting.
        known: The names of all settings.
        judged: Whether its value is looked at, too.
    """
    key = override.key_or_group
    if not override.is_add() and key not in known:
        hint, group = did_you_mean(key, known), key.split(".")[0]
        target = OmegaConf.select(cfg, f"{group}._target_") if group in GROUPS else None
        if isinstance(target, str) and not target.startswith("adq_train."):
            hint += f"; where {target} takes it, write +{key}=…"
        yield f"{key}: there is no such setting{hint}"
        return
    if _is_rare(override) or not judged:
        return  # Hydra and the signature check of the group look at these
    for value in _choices(override):
        trial = cfg.copy()
        try:
            OmegaConf.update(trial, key, value)
        except OmegaConfBaseException as error:
            yield f"{key}: {_plainly(first_line(error), value)}"
