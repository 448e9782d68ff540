"""Runs read back from their folders, finished or not; nothing that is found is left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adq_train.artifacts import BitAllocation, RunResult, SensitivityTable
from adq_train.errors import UserError
from adq_train.run.folder import read_metrics, read_status, read_values
from adq_train.run.manifest import read_manifest
from adq_train.settings.schema import identity
from adq_train.storage.files import oddity
from adq_train.storage.yaml_files import read_yaml

# What status.json may say; a run that was stopped or is running is unfinished here.
STATES = ("done", "failed", "running", "stopped")
# The largest file of a run that is read; a thousand epochs of a large network take a tenth.
MOST_BYTES = 2**28
# Folders of an output root that are no runs.
SHARED = "shared"
PAGE = "report.html"

V = TypeVar("V")


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it.

    Attributes:
        path: The folder.
        state: ``done``, ``failed``, ``unfinished`` or ``damaged``.
        note: Why it is not done, or what is missing of it; empty where all is well.
        config: The resolved configuration; empty where it cannot be read.
        manifest: Command, versions, data; empty where it cannot be read.
        result: Figures on the test split; None unless done.
        allocation: Bits; None unless done.
        sensitivity: The table, where there is one.
        records: Of ``metrics.jsonl``.
    """

    path: Path
    state: str
    note: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    result: RunResult | None
    allocation: BitAllocation | None
    sensitivity: SensitivityTable | None
    records: tuple[dict[str, Any], ...]

    @property
    def seed(self) -> int:
        """The run's seed."""
        seed: int = self.config["seed"]
        return seed

    @property
    def final_train_loss(self) -> float | None:
        """Training loss of the last epoch of QAT; None without QAT."""
        return self._final("train_loss")

    @property
    def final_validation_top1_percent(self) -> float | None:
        """Accuracy on the validation split after the last epoch of QAT; None without QAT."""
        return self._final("validation_top1_percent")

    def curve(self, name: str) -> dict[int, float]:
        """A figure of QAT's records by epoch; records that lack it, or an epoch, are left out."""
        found: dict[int, float] = {}
        for record in self.records:
            epoch, value = record.get("epoch"), record.get(name)
            if record.get("stage") == "qat" and isinstance(epoch, int) and _is_number(value):
                found[epoch] = record[name]
        return found

    def _final(self, name: str) -> float | None:
        values = [x.get(name) for x in self.records if x.get("stage") == "qat"]
        last: Any = values[-1] if values else None
        return float(last) if _is_number(last) else None


def gather(folders: Iterable[Path]) -> list[Run]:
    """Every run in or below the folders, each once, by path.

    Raises:
        UserError: A folder is missing or holds no run.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folder of a run or of a sweep")
        runs = {path.resolve(): path for path in run_folders(folder)}
        if not any((path / "config.yaml").exists() for path in runs.values()):
            raise UserError(
                f"{folder} holds no run: no config.yaml in it or below; give the folder of a run "
                "or of a sweep"
            )
        found |= {key: read_run(path) for key, path in runs.items() if key not in found}
    return sorted(found.values(), key=lambda run: str(run.path))


def run_folders(folder: Path) -> Iterator[Path]:
    """Folders of runs, and folders and links beside them that should have been some.

    Links are followed, each folder once: a run may have been moved to another disk.
    """
    seen: set[Path] = set()
    for place, names, files in os.walk(folder, followlinks=True):
        path = Path(place)
        if path.resolve() in seen:  # a link to a folder that it is in
            names.clear()
            continue
        seen.add(path.resolve())
        if "config.yaml" in files:
            names.clear()  # a run holds no other run
            yield path
            continue
        dead = [x for x in files if (path / x).is_symlink() and not (path / x).exists()]
        names[:] = sorted(n for n in names if n != SHARED and not (path / n / PAGE).exists())
        # A kill in the first moment leaves a folder without a configuration beside the others.
        inside = {
            name: any("config.yaml" in x for _, _, x in os.walk(path / name)) for name in names
        }
        if any((path / name / "config.yaml").exists() for name in names):
            yield from (path / name for name, holds in inside.items() if not holds)
            yield from (path / name for name in sorted(dead))


def read_run(path: Path) -> Run:
    """Reads one folder; whatever is wrong with it ends up in ``state`` and ``note``."""
    notes: list[str] = []

    if path.is_symlink() and not path.exists():
        note = f"a link to {path.readlink()}, which is not there"
        return Run(path, "damaged", note, {}, {}, None, None, None, ())

    def part(name: str, read: Callable[[Path], V]) -> V | None:
        try:
            if odd := oddity(path / name, MOST_BYTES):
                raise UserError(odd)
            return read(path / name)
        except FileNotFoundError:
            notes.append(f"{name} is missing")
        except (UserError, OSError, ValueError, RecursionError) as error:
            notes.append(f"{name} is {' '.join(str(error).split())}")
        return None

    config = part("config.yaml", read_config)
    if config is None:
        return Run(path, "damaged", "; ".join(notes), {}, {}, None, None, None, ())
    status = part("status.json", lambda _: read_status(path))
    if not isinstance(status, dict) or status.get("state") not in STATES:
        note = "status.json is missing or damaged"
        return Run(path, "damaged", note, config, {}, None, None, None, ())
    manifest = part("manifest.json", lambda _: read_manifest(path))
    if not isinstance(manifest, dict):
        manifest = {}
        notes[:] = ["manifest.json is missing or damaged"]
    if (path / "metrics.jsonl").exists():  # there is none without training
        records = tuple(part("metrics.jsonl", read_metrics) or ())
    else:
        records = ()
    if status["state"] != "done":
        state = "failed" if status["state"] == "failed" else "unfinished"
        note = _progress(status, records, config)
        return Run(path, state, note, config, manifest, None, None, None, records)
    sensitivity = part("sensitivity.json", read_sensitivity)
    lacking = len(notes)
    result = part("result.json", lambda x: RunResult.from_json(x.read_text("utf-8")))
    allocation = part("allocation.json", read_allocation)
    if len(notes) == lacking and manifest.get("float_models"):  # older runs have no stamps
        try:
            read_values(path, config)
        except UserError as error:
            notes.append(" ".join(str(error).split()))
    if len(notes) > lacking:
        note = "; ".join(notes[lacking:])
        return Run(path, "damaged", note, config, manifest, None, None, None, records)
    return Run(
        path, "done", "; ".join(notes), config, manifest, result, allocation, sensitivity, records
    )


def read_config(path: Path) -> dict[str, Any]:
    """A run's resolved configuration.

    Raises:
        UserError: It is not one of a run.
    """
    try:
        config: Any = read_yaml(path)
        same = identity(config)
        for section in ("data", "model", "weight_quantizer", "activation_quantizer"):
            str(same[section]["_target_"])
        same["budget"].items()
        if not isinstance(same["seed"], int):
            raise ValueError(f"seed is {same['seed']!r}")
    except Exception as error:  # YAML, OmegaConf and a missing section have errors of their own
        raise UserError(f"not the configuration of a run ({error!r})") from error
    found: dict[str, Any] = config
    return found


def read_allocation(path: Path) -> BitAllocation:
    """The bits of a run."""
    allocation = BitAllocation.from_json(path.read_text(encoding="utf-8"))
    if not allocation.layers:
        raise UserError("damaged: it has no layers")
    return allocation


def read_sensitivity(path: Path) -> SensitivityTable:
    """The sensitivities of a run, one for every layer and bit-width."""
    table = SensitivityTable.from_json(path.read_text(encoding="utf-8"))
    whole = all(set(table.bit_widths) <= set(layer.sensitivity) for layer in table.layers)
    if not (table.layers and table.bit_widths and whole):
        raise UserError("damaged: a layer or a bit-width is missing")
    return table


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _progress(status: dict[str, Any], records: Iterable[dict[str, Any]], config: Any) -> str:
    """How far a run came: its stage, the epoch of a training stage, and the error."""
    stage = str(status.get("stage"))
    words = f"in stage {stage}"
    epochs = [x.get("epoch") for x in records if x.get("stage") == stage]
    if epochs:
        section = config["pretrain" if stage == "pretrain" else "trainer"]
        words += f", {epochs[-1]} of {section.get('epochs')} epochs done"
    if status["state"] in ("failed", "stopped"):
        return f"{words}: {' '.join(str(status.get('error')).split())}"
    return f"stopped or still running {words}"
