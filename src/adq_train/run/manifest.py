"""``manifest.json``: what a run began with, and the conditions under which it went on."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adq_train import __version__
from adq_train.artifacts import Count
from adq_train.cpus import usable_cpus
from adq_train.errors import UserError
from adq_train.storage.decoding import decode
from adq_train.storage.files import write_text
from adq_train.storage.stamps import digest

log = logging.getLogger(__name__)

# What a run may be continued under although its bits may then be others.
CONDITIONS = (
    "git",
    "versions",
    "hardware",
    "processes",
    "cpu_threads",
    "kernels",
    "compile",
    "channels_last",
)
# What must be the same whenever it goes on.
INPUTS = ("data", "checkpoint_sha256", "files")


@dataclass(frozen=True)
class _Data:
    fingerprint: str
    name: str | None = None


@dataclass(frozen=True)
class _Model:
    num_float_values: Count
    num_edges: Count = 0
    target: str = ""


@dataclass(frozen=True)
class _FloatModel:
    sha256: str
    shared: str | None


@dataclass(frozen=True)
class _Manifest:
    """The fields that this program reads; a run of an earlier version may lack any."""

    command: tuple[str, ...] | None = None
    seed: Count | None = None
    device: str | None = None
    processes: Count | None = None
    cpu_threads: Count | None = None
    data: _Data | None = None
    model: _Model | None = None
    files: dict[str, str] | None = None
    versions: dict[str, str] | None = None
    float_models: dict[str, _FloatModel] | None = None


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of a run's ``manifest.json``.

    Raises:
        UserError: It is missing or damaged; the field is named.
    """
    file = path / "manifest.json"
    try:
        manifest: Any = json.loads(file.read_text(encoding="utf-8"))
        decode(_Manifest, manifest)
        if not all(isinstance(x, dict) for x in manifest.get("continued", [])):
            raise ValueError("continued is not a list of objects")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); delete it, and the run's command writes it anew"
        ) from error
    found: dict[str, Any] = manifest
    return found


def write_manifest(path: Path, facts: dict[str, Any]) -> None:
    """Writes ``manifest.json``, or checks that the inputs are still those of the first start.

    Where the conditions are not, they are noted and a warning says so.

    Raises:
        UserError: The data set, the float checkpoint or another file has changed since.
    """
    file = path / "manifest.json"
    now = {**environment(facts.get("device", "cpu")), **facts}
    if not file.exists():
        write_text(file, json.dumps(now, indent=2) + "\n")
        return
    first = read_manifest(path)
    for key in INPUTS:
        if key in first and first[key] != facts.get(key):
            raise UserError(
                f"{key}: not what the run in {path} began with; choose another run_dir to start "
                "anew"
            )
    last = [first, *first.get("continued", [])][-1]
    known = [key for key in CONDITIONS if key in last]  # an earlier version noted fewer
    changed = list(differences({x: last[x] for x in known}, {x: now.get(x) for x in known}))
    if changed:
        log.warning(
            "the run continues under other conditions than before (%s): it may not have the bits "
            "of one without an interruption",
            "; ".join(changed),
        )
        again = {key: now[key] for key in CONDITIONS if key in now}
        continued = [*first.get("continued", []), again]
        write_text(file, json.dumps({**first, "continued": continued}, indent=2) + "\n")


def note_float_model(path: Path, stage: str, weights: str, shared: str | None) -> None:
    """Notes the float model that a run goes on with, or checks that it is still the same.

    Args:
        path: The run's folder.
        stage: ``pretrain`` or ``teacher``.
        weights: Digest of its parameters and buffers.
        shared: Name of the shared folder that it is from.

    Raises:
        UserError: The run began with another one.
    """
    if not (path / "manifest.json").exists():  # a study that keeps none
        return
    manifest = read_manifest(path)
    noted = manifest.get("float_models") or {}
    if stage not in noted:
        noted = {**noted, stage: {"sha256": weights, "shared": shared}}
        content = {**manifest, "float_models": noted}
        write_text(path / "manifest.json", json.dumps(content, indent=2) + "\n")
    elif noted[stage]["sha256"] != weights:
        raise UserError(
            f"{stage}: the float model is not the one that the run in {path} began with (its "
            f"weights' digest in manifest.json is {noted[stage]['sha256'][:12]}…, now "
            f"{weights[:12]}…); choose another run_dir to start anew, or delete that run"
        )


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """The values that differ between two nested dictionaries, as ``name: old → new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))
    elif digest(old) != digest(new):  # as checkpoints compare: 0 is not 0.0
        yield f"{path}: {old} → {new}"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Source, versions and machine, for ``manifest.json``.

    Args:
        device: Where the run computes.
    """
    import torch
    import torchvision

    from adq_train.quantization import gpu_kernels, kernels

    where = torch.device(device)
    return {
        "git": git_state(),
        "versions": {
            "adq_train": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": processor(),
        "hardware": hardware(device),
        "cpu_threads": torch.get_num_threads(),
        "kernels": gpu_kernels.in_use(where) if where.type == "cuda" else kernels.in_use(),
    }


def hardware(device: str) -> str:
    """The kind of processor, as far as sums depend on it: ``cpu AVX512``, ``NVIDIA H100``."""
    import torch

    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    if where.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return where.type


def processor() -> str:
    """The model of the CPU and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{usable_cpus()} × {name}"


def git_state() -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that this code runs from; None outside of one."""

    def git(*arguments: str) -> str:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed copy inside another checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
