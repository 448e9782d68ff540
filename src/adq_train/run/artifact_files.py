"""Files that a run has kept, taken again only where they are what they should be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adq_train.allocation.budget import Bits, Problem, figures
from adq_train.allocation.problem import problem_of
from adq_train.artifacts import A, Artifact, BitAllocation, LayerInfo, SensitivityTable
from adq_train.errors import UserError
from adq_train.settings.schema import Config, identity
from adq_train.storage.stamps import digest, origin_problem

# Stages' values, in the order in which they are made.
ARTIFACTS = ("sensitivity.json", "allocation.json", "levels.json", "result.json")
BY_HAND = {"sensitivity.json": "sensitivity", "allocation.json": "allocator"}


def origin(same: Mapping[str, Any], fingerprint: str, weights: str) -> str:
    """Digest of what every value of a run is made from.

    Args:
        same: The run's identity, its configuration without places and switches.
        fingerprint: Of the data set.
        weights: Digest of the float model's parameters and buffers.
    """
    return digest([same, fingerprint, weights])


def float_key(config: dict[str, Any]) -> str:
    """The run that a float model was kept with, from its configuration as it is kept."""
    return digest([identity(config), "float"])


def qat_key(config: dict[str, Any], allocation: BitAllocation, origin: str | None) -> str:
    """What QAT depends on; its checkpoints carry it.

    Args:
        config: The configuration, as it is kept.
        allocation: The bits.
        origin: The run's; None for one of a version that had none.
    """
    return digest([identity(config), allocation.to_json(), *([origin] if origin else [])])


def depends_on(origin: str, of: Artifact | None) -> str:
    """Digest of what a value is made from: the run's origin, and the value before it."""
    return digest([origin, json.loads(of.to_json()) if of else None])


def take(path: Path, content: bytes, kind: type[A], source: str | None) -> A:
    """The value in a file that a run has kept.

    Args:
        path: The file.
        content: What it holds.
        kind: Of the value.
        source: What its stamp must say it depends on; None: not checked.

    Raises:
        UserError: It is damaged, was edited, or is another run's; the file is named.
    """
    section = BY_HAND.get(path.name)
    door = f", or use it through {section}=from_file {section}.path=…" if section else ""
    try:
        text = content.decode()
        value: A = kind.from_json(text)
        problem = origin_problem(json.loads(text), source) if source else None
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is {error}; delete it to make it anew{door}") from error
    if problem:
        raise UserError(f"{path} cannot be used: {problem}; delete it to make it anew{door}")
    return value


def require_figures(file: Path, allocation: BitAllocation, problem: Problem) -> None:
    """Refuses a kept allocation that breaks the budget or the pins, or whose figures are wrong.

    Raises:
        UserError: Names the file and the field.
    """
    bits = {x.name: Bits(x.weight_bits, x.activation_bits) for x in allocation.layers}
    problems = [
        f"{name} has {given.weights}/{given.activations} bits, but is pinned to {own.weights}"
        for name, own in problem.pinned_bits().items()
        if (given := bits[name]) != own
    ]
    problems += [f"its bits exceed {phrase}" for phrase in problem.broken(bits)]
    counted = asdict(figures(problem.layers, bits, problem.pinned))
    problems += [
        f"{name} is {stated}, but its bits come to {value}"
        for name, value in counted.items()
        if (stated := getattr(allocation, name)) != value
    ]
    if problems:
        raise UserError(
            f"{file}: {'; '.join(problems[:3])}; delete it to make it anew, or use it through "
            "allocator=from_file allocator.path=…"
        )


def require_layers(file: Path, names: Sequence[str], layers: Sequence[LayerInfo]) -> None:
    """Refuses a kept value whose layers are not the model's.

    Raises:
        UserError: Names the file and the layers.
    """
    odd = sorted({x.name for x in layers} ^ set(names))
    if odd:
        raise UserError(
            f"{file} and the model differ in the layers {', '.join(odd[:3])}; delete the file to "
            "make it anew"
        )


def read_bits(
    path: Path, config: dict[str, Any], source: str | None
) -> tuple[SensitivityTable, BitAllocation]:
    """The table and the bits of a finished run, checked against each other and its settings.

    Args:
        path: The run's folder.
        config: Its resolved configuration.
        source: Its :func:`origin`; None for a run of a version that kept no stamps.

    Raises:
        UserError: One is missing, damaged or another run's, or its figures are wrong.
    """
    table = read(path / "sensitivity.json", SensitivityTable, source and depends_on(source, None))
    allocation = read(path / "allocation.json", BitAllocation, source and depends_on(source, table))
    layers = tuple(
        LayerInfo(x.name, x.num_weights, x.macs, x.num_inputs or 1) for x in table.layers
    )
    require_layers(path / "allocation.json", [x.name for x in allocation.layers], layers)
    if source and all(x.num_inputs for x in table.layers):
        settings = Config.of(config)
        problem = problem_of(layers, settings.bits, settings.budget)
        require_figures(path / "allocation.json", allocation, problem)
    return table, allocation


def read(path: Path, kind: type[A], source: str | None) -> A:
    """As :func:`take`, from the file itself.

    Raises:
        UserError: Also where it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); the run's command makes it anew"
        ) from error
    return take(path, content, kind, source)
