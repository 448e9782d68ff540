"""Short names: of a run's data set and model, and of what tells groups of runs apart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adq_train.reporting.gather import Run
from adq_train.settings.schema import NOTHING, PLACE, ROUNDING, settings_where

# Overrides that change where a run goes or which of several equal ones it is.
HIDDEN = {
    "seed",
    *settings_where(lambda x: x.affects in (NOTHING, ROUNDING) or x.path is PLACE),
}
AS_IS = "as configured"
# Choices that change nothing.
DEFAULTS = {"ablation=none", "ablation=null", "comparison=null", "experiment=null"}


def data_name(run: Run) -> str:
    """Name of a run's data set, as its manifest or its configuration has it."""
    data = run.manifest.get("data")
    if isinstance(data, dict) and data.get("name"):
        return str(data["name"])
    return str(run.config["data"].get("name", short(run.config["data"]["_target_"])))


def model_name(run: Run) -> str:
    """Name of a run's model: ``resnet20``, with its width where that is not the usual one."""
    model = run.config["model"]
    if "depth" in model:
        width = model.get("width", 16)
        return f"resnet{model['depth']}" + ("" if width == 16 else f", width {width}")
    target = str(model["_target_"])
    own = short(target) if target.startswith("adq_train.") else target.rsplit(".", 1)[-1]
    return str(model.get("name", own))


def model_key(run: Run) -> str:
    """What makes a model another one."""
    return json.dumps(run.config["model"], sort_keys=True)


def short(target: str) -> str:
    """The module of a target: ``lsq`` of ``adq_train.quantization.lsq.LsqWeightQuantizer``."""
    return str(target).rsplit(".", 2)[-2] if str(target).count(".") > 1 else str(target)


def overrides_of(run: Run) -> tuple[str, ...]:
    """The overrides of a run's command that say what it is, in the order of the command."""
    command = run.manifest.get("command")
    words = command[1:] if isinstance(command, list) else []
    pattern = r"\+{0,2}[A-Za-z_][\w./@]*=[^\n\r]*"
    found = [word.lstrip("+") for word in map(str, words) if re.fullmatch(pattern, word)]
    last = {x.split("=")[0]: x for x in found}  # which counts where one is given twice
    return tuple(x for key, x in last.items() if key not in HIDDEN and not key.startswith("hydra."))


def names_of(
    groups: Mapping[str, Sequence[Run]], shared: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, str], dict[str, int], str]:
    """What tells groups of runs apart: the overrides of their commands, or else their settings.

    Args:
        groups: The runs of each group, by any key.
        shared: The settings of each group, by the same key.

    Returns:
        A name for each group; how many overrides it has beyond the common ones; what is common.
    """
    chosen = {}
    for key, runs in groups.items():
        first, *others = [overrides_of(run) for run in runs]
        chosen[key] = [x for x in first if all(x in other for other in others)]
    common = set.intersection(*map(set, chosen.values()))
    own = {key: [x for x in found if x not in common] for key, found in chosen.items()}
    names = {key: " ".join(found) or AS_IS for key, found in own.items()}
    in_order = " ".join(x for x in next(iter(chosen.values())) if x in common)
    if len(set(names.values())) < len(names):  # the commands do not tell the groups apart
        differing = _differing(list(shared.values()))
        names = {
            key: " ".join(_word(name, found) for name in differing if name in found) or AS_IS
            for key, found in shared.items()
        }
        return names, dict.fromkeys(names, 0), in_order
    counts = {key: len(set(found) - DEFAULTS) for key, found in own.items()}
    return names, counts, in_order


def _differing(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that differ; those of a part only among the rows that have the same part."""
    differing = []
    for name in sorted({name for settings in found for name in settings}):
        target = f"{name.split('.')[0]}._target_"
        by_target: dict[Any, set[str]] = {}
        for settings in found:
            kind = None if name == target else settings.get(target)
            by_target.setdefault(kind, set()).add(repr(settings.get(name)))
        if any(len(values) > 1 for values in by_target.values()):
            differing.append(name)
    return differing


def _word(name: str, settings: Mapping[str, Any]) -> str:
    if name.endswith("._target_"):
        return f"{name.removesuffix('._target_')}={short(settings[name])}"
    value = settings[name]
    return f"{name}={'null' if value is None else str(value).replace(' ', '')}"


def told_apart(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Names of rows without the settings that they can do without, for a legend.

    Args:
        rows: The overrides of each, ``key=value``; no two rows have the same.
    """
    found = [{word.split("=")[0]: word for word in words} for words in rows]
    keys = dict.fromkeys(key for row in found for key, word in row.items() if "=" in word)
    # What says most is left out last: a comparison, a choice of a group, a setting.
    for key in sorted(keys, key=lambda key: (key in ("comparison", "ablation"), "." not in key)):
        without = [{k: x for k, x in row.items() if k != key} for row in found]
        if len({tuple(row.values()) for row in without}) == len(found) and all(without):
            found = without
    return [" ".join(row.values()) or "budgets" for row in found]


def terms(name: str) -> frozenset[str]:
    """The overrides in a row's name."""
    return frozenset(name.split())


def natural(name: str) -> list[Any]:
    """Sorts 2 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(x), "") if i % 2 else (0.0, x) for i, x in enumerate(parts)]
