"""Where the figures of a training go besides ``metrics.jsonl``: one file per tracker.

A tracker is imported only when it is chosen.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from adq_train.errors import UserError
from adq_train.settings.ranges import leaves
from adq_train.settings.schema import identity
from adq_train.storage.files import write_text

LOGGERS = {
    "tensorboard": "TensorboardLogger",
    "csv": "CsvLogger",
    "mlflow": "MlflowLogger",
    "wandb": "WandbLogger",
}
# Sections in the order in which trackers show them, by name: what one looks at first.
TAGS = {
    "train_loss": "1_loss/train",
    "validation_loss": "1_loss/validation",
    "validation_top1_percent": "2_accuracy/validation_top1_percent",
    "lr": "3_learning_rate/lr",
    "images_per_second": "4_speed/images_per_second",
    "data_wait_percent": "4_speed/data_wait_percent",
    "peak_memory_bytes": "4_speed/peak_memory_bytes",
}
IDS = "trackers.json"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a finished run was, and what came of it.

    Attributes:
        settings: Its configuration, nested.
        figures: By name: accuracies on the test set in percent, bits, bytes.
        pictures: PNG files by name.
    """

    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    pictures: Mapping[str, Path]


class Logger:
    """A tracker of one stage; every method here does nothing.

    Args:
        folder: The run's.
        stage: ``pretrain`` or ``qat``.
        done: Finished epochs of the stage; what came after them is void.
        before: Epochs of the stages before, so that all lie in one timeline.
    """

    def __init__(self, folder: Path, stage: str, done: int, before: int) -> None:
        self.folder, self.stage, self.done, self.before = folder, stage, done, before
        self.is_new = False  # whether it has yet to be told what is done already

    def epoch(self, record: Record) -> None:
        """What an epoch gave; ``epoch`` counts from 1 within the stage."""

    def pictures(self, model: nn.Module, epoch: int) -> None:
        """Draws weights and levels of a quantized network."""

    def outcome(self, outcome: Outcome) -> None:
        """Once, at the end of the run: what its table of runs shows."""

    def close(self) -> None:
        """After the last epoch of this process."""

    def step(self, epoch: int) -> int:
        """The place of an epoch in the timeline."""
        return self.before + epoch


def started(
    names: Sequence[str], folder: Path, stage: str, records: Iterable[Record], done: int
) -> list[Logger]:
    """The chosen trackers of a stage; a new one is told what earlier processes recorded.

    Args:
        names: Of :data:`LOGGERS`.
        folder: The run's.
        stage: ``pretrain`` or ``qat``.
        records: Of all stages, as ``metrics.jsonl`` has them.
        done: Finished epochs of the stage.

    Raises:
        UserError: A package is missing, or a tracker does not start.
    """
    records = list(records)
    before = 0
    if stage == "qat":
        before = max((x["epoch"] for x in records if x["stage"] == "pretrain"), default=0)
    found: list[Logger] = []
    for name in names:
        module = importlib.import_module(f"adq_train.reporting.loggers.{name}_logger")
        logger: Logger = getattr(module, LOGGERS[name])(folder, stage, done, before)
        for record in records if logger.is_new else ():
            if record["stage"] == stage:
                logger.epoch(record)
        found.append(logger)
    return found


def plain(outcome: Outcome) -> dict[str, Any]:
    """The settings that make a run what it is, by dotted name."""
    return {name: x for name, x in leaves(identity(dict(outcome.settings))) if x is not None}


def scalars(record: Record) -> dict[str, float]:
    """The figures of an epoch by the names that trackers show."""
    found = {tag: float(record[name]) for name, tag in TAGS.items()}
    for layer, figures in (record.get("movement") or {}).items():
        found |= {f"5_movement_{name}/{layer}": float(x) for name, x in figures.items()}
    return found


def require(package: str) -> Any:
    """Imports the package of a tracker.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"logger: {package} is not installed ({error}); pip install 'adq-train[{package}]'"
        ) from error


def kept_id(folder: Path, name: str, new: str | None = None) -> str | None:
    """The name that a tracker knows this run by, of an earlier process; or keeps a new one."""
    path = folder / IDS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if new is not None:
        write_text(path, json.dumps({**found, name: new}, indent=2) + "\n")
        return new
    known = found.get(name)
    return known if isinstance(known, str) else None
