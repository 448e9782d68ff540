"""Runs in groups: a section per data set and model, a row per setting, the seeds in a row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adq_train.errors import UserError, did_you_mean
from adq_train.reporting.gather import Run
from adq_train.reporting.names import data_name, model_key, model_name, names_of, natural, terms
from adq_train.reporting.statistics import Difference, Summary, compare, judge, summarize
from adq_train.settings.schema import INPUT, PLACE, identity, settings_where

# Besides the distillation: settings that make a training loss another figure.
LOSS_SETTINGS = settings_where(lambda x: x.in_loss)


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed.

    Attributes:
        name: The overrides (or settings) that tell it from the section's other rows.
        settings: What its runs share, flat: ``{"trainer.epochs": 40, …}``.
        overrides: How many overrides it has that others have not, ``ablation=none`` not counted.
        runs: Finished runs, one for each seed.
        members: All its runs: unfinished ones too, and those that are there twice.
    """

    name: str
    settings: Mapping[str, Any]
    overrides: int
    runs: tuple[Run, ...]
    members: tuple[Run, ...]

    def by_seed(self) -> dict[int, float]:
        """Top-1 accuracy after QAT in percent, by seed."""
        return {run.seed: run.result.qat_top1_percent for run in self.runs if run.result}

    def losses(self) -> dict[int, float]:
        """Training loss of the last epoch of QAT, by seed."""
        found = {run.seed: run.final_train_loss for run in self.runs}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    def loss_settings(self) -> dict[str, Any]:
        """What decides the meaning of a training loss."""
        return {
            name: value
            for name, value in self.settings.items()
            if name.startswith("distillation.") or name in LOSS_SETTINGS
        }

    @property
    def taught(self) -> bool:
        """Whether the training loss is, in part, a distance to a teacher."""
        target = str(self.settings.get("distillation._target_", "NoDistillation"))
        return not target.endswith("NoDistillation")

    def mean(self, name: str) -> float:
        """Mean of a field that every finished run has; see :meth:`summary`."""
        found = self.summary(name)
        assert found is not None
        return found.mean

    def summary(self, name: str) -> Summary | None:
        """Mean and spread of a field of the result or the allocation, or of the training loss."""
        values = []
        for run in self.runs:
            holder = run.result if hasattr(run.result, name) else run.allocation
            value = run.final_train_loss if name == "final_train_loss" else getattr(holder, name)
            if value is not None:
                values.append(float(value))
        return summarize(values)


@dataclass(frozen=True)
class Section:
    """The rows that may be compared: one data set and one model.

    Attributes:
        data: Name of the data set.
        model: Name of the model.
        common: Overrides that all its runs share.
        rows: Each reference row, then those that are compared with it.
        references: For each row the name of the one that it is compared with, or None.
        differences: For each row what may be said about the difference, or None.
        problems: Seeds that a row lacks, and runs that are there twice.
        remarks: What the runs do not share besides their settings: versions, commits.
    """

    data: str
    model: str
    common: str
    rows: tuple[Row, ...]
    references: tuple[str | None, ...]
    differences: tuple[Difference | None, ...]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    def references_in_use(self) -> set[str]:
        """Names of the rows that another one is compared with."""
        pairs = zip(self.rows, self.references, strict=True)
        return {name for row, name in pairs if name is not None and name != row.name}


def sections(runs: Iterable[Run], reference: str | None = None) -> list[Section]:
    """Sorts runs into sections and rows.

    Args:
        runs: All that have a configuration, finished or not.
        reference: A row's name, or some of its overrides; None takes the row with the fewest
            overrides among those with the same budget.

    Raises:
        UserError: No row has that name.
    """
    parts: dict[str, list[Run]] = {}
    for run in runs:
        if run.config:
            parts.setdefault(f"{data_name(run)}\0{model_key(run)}", []).append(run)
    made = [_rows(parts[key]) for key in sorted(parts)]
    if reference is not None:
        names = [row.name for rows, _, _ in made for row in rows]
        if not any(terms(reference) <= terms(name) for name in names):
            raise UserError(
                f"reference: no row is called {reference!r}{did_you_mean(reference, names)}; "
                f"choose from {'; '.join(names)}"
            )
    return [
        _section(part, rows, common, problems, reference)
        for part, (rows, common, problems) in zip(
            (parts[key] for key in sorted(parts)), made, strict=True
        )
    ]


def settings_of(run: Run) -> dict[str, Any]:
    """What decides the outcome of a run besides its seed, flat; places are left out."""
    # init_from_sha256 is among the files.
    left_out = {"seed", "init_from_sha256", *settings_where(lambda x: x.path is PLACE)}
    flat = {k: v for k, v in _flatten(identity(run.config)) if k not in left_out}
    data = run.manifest.get("data")
    fingerprint = data.get("fingerprint") if isinstance(data, dict) else None
    files, checkpoint = run.manifest.get("files"), run.manifest.get("checkpoint_sha256")
    return {
        **flat,
        **({k: str(v)[:12] for k, v in files.items()} if isinstance(files, dict) else {}),
        "data.fingerprint": str(fingerprint)[:12] if fingerprint else None,
        "pretrain.checkpoint": str(checkpoint)[:12] if checkpoint else None,
    }


def _flatten(node: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flatten(value, f"{path}.{key}".strip("."))
    else:
        yield path, node


def _rows(runs: Sequence[Run]) -> tuple[list[Row], str, list[str]]:
    """The rows of one section, what all its runs share, and its problems."""
    settings = [settings_of(run) for run in runs]
    problems = []
    files = "pretrain.checkpoint", "init_from", *settings_where(lambda x: x.path is INPUT)
    for name in (*files, "allocator.seed"):
        settings, of_seeds = _without_values_of_seeds(runs, settings, name)
        if of_seeds:
            problems.append(f"each seed has its own {name}")
    known = {x["data.fingerprint"] for x in settings} - {None}
    for found in settings:
        if found["data.fingerprint"] is None and len(known) == 1:
            (found["data.fingerprint"],) = known
    groups: dict[str, list[Run]] = {}
    shared: dict[str, dict[str, Any]] = {}
    for run, found in zip(runs, settings, strict=True):
        key = json.dumps(found, sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
        shared[key] = found
    names, counts, common = names_of(groups, shared)
    every_seed = sorted({run.seed for run in runs})
    rows = []
    for key, members in groups.items():
        done: dict[int, Run] = {}
        for run in members:
            if run.state != "done":
                continue
            if run.seed in done:
                problems.append(
                    f"{run.path}: the same settings and seed as {done[run.seed].path}; counted once"
                )
                continue
            done[run.seed] = run
        there = {run.seed for run in members}
        absent = [str(seed) for seed in every_seed if seed not in there]
        if absent:
            problems.append(
                f"{names[key]}: no run for seed {', '.join(absent)}, which other rows have"
            )
        rows.append(
            Row(
                names[key],
                shared[key],
                counts[key],
                tuple(done[seed] for seed in sorted(done)),
                tuple(members),
            )
        )
    return rows, common, problems


def _without_values_of_seeds(
    runs: Sequence[Run], settings: Sequence[dict[str, Any]], name: str
) -> tuple[list[dict[str, Any]], bool]:
    """The settings without one that has a value for each seed: the seed tells it already.

    Returns:
        The settings, and whether some runs really had a value for each seed. Where two seeds share
        one and a third has another, or none, it is a choice and stays.
    """
    others = [{k: v for k, v in found.items() if k != name} for found in settings]
    keys = [json.dumps(found, sort_keys=True, default=str) for found in others]
    pairs: dict[str, set[tuple[int, Any]]] = {}
    for run, key, found in zip(runs, keys, settings, strict=True):
        pairs.setdefault(key, set()).add((run.seed, found.get(name)))
    seeds = {key: {seed for seed, _ in found} for key, found in pairs.items()}
    values = {key: {value for _, value in found} for key, found in pairs.items()}
    own = {key for key in pairs if len(pairs[key]) == len(seeds[key]) == len(values[key]) > 1}
    own -= {key for key in own if None in values[key]}
    fewer = [
        other if key in own or len(values[key]) == 1 else found
        for key, found, other in zip(keys, settings, others, strict=True)
    ]
    return fewer, bool(own)


def _section(
    runs: Sequence[Run],
    rows: Sequence[Row],
    common: str,
    problems: Sequence[str],
    reference: str | None,
) -> Section:
    """Chooses references, compares, and orders the rows."""
    chosen = _references(rows, reference)
    judged = judge([difference_of(row, other) for row, other in zip(rows, chosen, strict=True)])

    def place(index: int) -> tuple[Any, ...]:
        """Every reference with the rows that are compared with it."""
        row, other = rows[index], chosen[index]
        return natural((other or row).name), other is not row, natural(row.name)

    order = sorted(range(len(rows)), key=place)
    picked = [chosen[i] for i in order]
    return Section(
        data=data_name(runs[0]),
        model=model_name(runs[0]),
        common=common,
        rows=tuple(rows[i] for i in order),
        references=tuple(None if x is None else x.name for x in picked),
        differences=tuple(judged[i] for i in order),
        problems=tuple(problems),
        remarks=tuple(_remarks(runs)),
    )


def difference_of(row: Row, reference: Row | None) -> Difference | None:
    """What the seeds say of a row beside its reference, in accuracy and in training loss."""
    if reference is None or reference is row:
        return None
    found = compare(row.by_seed(), reference.by_seed())
    if found is None:
        return None
    found = replace(found, more_bits=_more_bits(row, reference))
    losses, others = row.losses(), reference.losses()
    common = losses.keys() & others.keys()
    if not common or row.loss_settings() != reference.loss_settings():
        return found
    lower = sum(losses[seed] < others[seed] for seed in common)
    return replace(found, lower_losses=(lower, len(common)))


def _more_bits(row: Row, reference: Row) -> tuple[float, float]:
    """What a row's bits are beyond its reference's: one budget may be used up by one of them."""
    weights, inputs = (
        row.mean(name) - reference.mean(name)
        for name in ("average_weight_bits", "average_activation_bits")
    )
    return weights, inputs


def _references(rows: Sequence[Row], reference: str | None) -> list[Row | None]:
    """For each row the one that it is compared with."""
    counted = Counter(item for row in rows for item in row.settings.items() if _hashable(item))

    def plainness(row: Row) -> tuple[Any, ...]:
        """Few overrides first, then settings that most rows have, then the name."""
        unusual = -sum(counted[x] for x in row.settings.items() if _hashable(x))
        return row.overrides, unusual, natural(row.name)

    chosen: list[Row | None] = []
    for row in rows:
        if reference is None:
            among = [x for x in rows if x.runs and _budget(x) == _budget(row)]
            chosen.append(min(among, key=plainness, default=None))
        else:
            among = [x for x in rows if terms(reference) <= terms(x.name)]
            exact = [x for x in among if x.name == reference]
            near = {x.name: len(terms(x.name) & terms(row.name)) for x in among}
            nearest = sorted(exact or among, key=lambda x: (-near[x.name], plainness(x)))
            chosen.append(nearest[0] if nearest else None)
    return chosen


def _hashable(item: tuple[str, Any]) -> bool:
    return not isinstance(item[1], list | dict)


def _budget(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.settings.items() if k.startswith("budget.")}


def _remarks(runs: Sequence[Run]) -> Iterable[str]:
    """What else differs between runs, and could explain a difference."""
    starts = [
        start for run in runs for start in (run.manifest, *(run.manifest.get("continued") or []))
    ]
    git = [start.get("git") for start in starts if isinstance(start, dict)]
    commits = {str(x.get("commit"))[:8] for x in git if isinstance(x, dict)}
    if len(commits) > 1:
        yield f"made with different commits: {', '.join(sorted(commits))}"
    if any(isinstance(x, dict) and x.get("dirty") for x in git):
        yield "some were made with uncommitted changes"
    for what in ("versions", "platform", "device"):
        found = {
            json.dumps(run.manifest[what], sort_keys=True) for run in runs if what in run.manifest
        }
        if len(found) > 1:
            yield f"made with different {what}: {'; '.join(sorted(found))}"
