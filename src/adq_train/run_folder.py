"""The folder of a run: its identity, its state, its lock, and the artifacts in it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from omegaconf import OmegaConf

from adq_train import __version__
from adq_train.errors import UserError
from adq_train.files import write_text
from adq_train.yaml_files import read_yaml

if TYPE_CHECKING:  # adq-report reads runs without torch
    from adq_train.training.distributed import Ranks

log = logging.getLogger(__name__)

# Settings that change where or how a run goes, but not what comes out of it.
NOT_PART_OF_A_RUN = (
    "run_dir",
    "output_root",
    "init_from",
    "dry_run",
    "debug",
    "trusted_packages",
    "data.num_workers",
    "trainer.device",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.checkpoint_every_steps",
    "trainer.checkpoint_every_minutes",
    "trainer.check_ranks",
)

# Settings that name a file besides ``pretrain.checkpoint``: what it holds is part of a run.
INPUT_FILES = ("distillation.checkpoint", "allocator.path", "sensitivity.path")

# A file of its own: network file systems lock no folders.
LOCK = ".lock"


class _Artifact(Protocol):
    def to_json(self) -> str: ...

    @classmethod
    def from_json(cls, text: str) -> Any: ...


A = TypeVar("A", bound=_Artifact)


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """What a run is: its resolved configuration without places and switches."""
    same = {k: v for k, v in config.items() if k not in NOT_PART_OF_A_RUN}
    for section in ("data", "trainer"):
        same[section] = {
            k: v for k, v in config[section].items() if f"{section}.{k}" not in NOT_PART_OF_A_RUN
        }
    return same


def input_files(config: dict[str, Any]) -> dict[str, Path]:
    """The files that :data:`INPUT_FILES` name in a configuration, by setting."""
    named = {name: name.split(".") for name in INPUT_FILES}
    values = {name: config[section].get(key) for name, (section, key) in named.items()}
    return {name: Path(x) for name, x in values.items() if x and Path(x).is_file()}


def digest(content: Any) -> str:
    """Hexadecimal SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """The settings that differ between two configurations, as ``name: old → new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))
    elif digest(old) != digest(new):  # as checkpoints compare: 0 is not 0.0
        yield f"{path}: {old} → {new}"


class RunFolder:
    """A folder that belongs to one configuration, and to one process at a time.

    Opened with a with block: it writes ``config.yaml``, keeps ``status.json`` up to date, sends
    the log to ``train.log``, and notes why a run ended.

    Args:
        path: The folder; made where it is missing.
        config: The resolved configuration.
        ranks: The processes of the run, by default this one alone. Rank 0 writes, and reads for
            all of them.

    Raises:
        UserError: It holds a run with other settings, another process writes to it, or it cannot
            be written.
    """

    def __init__(self, path: Path, config: dict[str, Any], ranks: Ranks | None = None) -> None:
        from adq_train.training.distributed import ALONE

        ranks = ranks or ALONE
        self.path = path
        self.config = config
        self.ranks = ranks
        self.stage_name = "setup"
        self.seconds: dict[str, float] = {}
        if ranks.is_main:
            check_same_run(path, config)

    def __enter__(self) -> RunFolder:
        if self.ranks.is_main:
            self._open()
        return self

    def _open(self) -> None:
        """Takes the lock and writes what a run begins with."""
        existed = self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _open_lock(self.path)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise UserError(
                f"run_dir: another process is writing to {self.path}; wait for it, or choose "
                "another run_dir"
            ) from error
        except OSError as error:
            raise UserError(
                f"run_dir: cannot write to {self.path} ({error.strerror}); choose another "
                "run_dir or output_root"
            ) from error
        try:
            check_same_run(self.path, self.config)
            write_text(self.path / "config.yaml", OmegaConf.to_yaml(self.config))
            self.seconds = (read_status(self.path) or {}).get("seconds", {})
            self._write_status("running")
        except BaseException:
            os.close(self._lock)
            if not existed:
                with contextlib.suppress(OSError):
                    (self.path / LOCK).unlink()
                    self.path.rmdir()
            raise
        self.log_file = logging.FileHandler(
            self.path / "train.log", encoding="utf-8", errors="backslashreplace"
        )
        self.log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        logging.getLogger("adq_train").addHandler(self.log_file)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.ranks.is_main:
            return
        try:
            if error is None:
                self._write_status("done")
            else:
                reason = str(error) or type(error).__name__
                log.debug("stopped in stage %s: %s", self.stage_name, reason, exc_info=error)
                state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                with contextlib.suppress(UserError):  # a full disk must not hide the first error
                    self._write_status(state, reason)
        finally:
            logging.getLogger("adq_train").removeHandler(self.log_file)
            with contextlib.suppress(OSError):  # as above
                self.log_file.close()
            os.close(self._lock)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Marks a stage in ``status.json`` and adds up its time, over interruptions."""
        self.stage_name = name
        self._write_status("running")
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self._write_status("running")

    def save(self, name: str, artifact: _Artifact) -> None:
        """Writes a stage's value as JSON, whole or not at all."""
        if self.ranks.is_main:
            write_text(self.path / name, artifact.to_json())

    def load(self, name: str, kind: type[A]) -> A | None:
        """The value that an earlier run left, or None.

        Raises:
            UserError: The file is damaged; it is named.
        """
        path = self.path / name
        content = self.ranks.share(lambda: path.read_bytes() if path.exists() else None)
        if content is None:
            return None
        try:
            value: A = kind.from_json(content.decode())
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is {error}; delete it to make it anew") from error
        return value

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """Writes ``manifest.json``, or checks that the inputs are still those of the first start.

        Where commit or versions are not, they are noted and a warning says so.

        Raises:
            UserError: The data set, the float checkpoint or another file has changed since.
        """
        if not self.ranks.is_main:
            return
        path, now = self.path / "manifest.json", environment()
        if not path.exists():
            write_text(path, json.dumps({**now, **facts}, indent=2) + "\n")
            return
        before = read_manifest(self.path)
        for key in ("data", "checkpoint_sha256", "files"):
            if key in before and before[key] != facts.get(key):
                raise UserError(
                    f"{key}: not what the run in {self.path} began with; choose another run_dir "
                    "to start anew"
                )
        if before.get("processes", 1) != facts.get("processes", 1):
            log.warning(
                "the run began with %d processes and continues with %d: it will not have the same "
                "bits as one without an interruption",
                before.get("processes", 1),
                facts["processes"],
            )
        starts = [before, *before.get("continued", [])]
        code = {key: now[key] for key in ("git", "versions")}
        if any(starts[-1].get(key) != value for key, value in code.items()):
            log.warning("the run continues with another commit or other versions than before")
            again = {**before, "continued": [*starts[1:], code]}
            write_text(path, json.dumps(again, indent=2) + "\n")

    def _write_status(self, state: str, error: str | None = None) -> None:
        if not self.ranks.is_main:
            return
        stage = None if state == "done" else self.stage_name
        content = {"state": state, "stage": stage, "error": error, "seconds": self.seconds}
        write_text(self.path / "status.json", json.dumps(content, indent=2) + "\n")


def read_status(path: Path) -> dict[str, Any] | None:
    """The content of ``status.json``, or None where there is none."""
    try:
        status: dict[str, Any] = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of ``manifest.json``.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'manifest.json'} cannot be read ({error})") from error
    return manifest


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``; lines that a kill cut off, or no record, are left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def check_same_run(path: Path, config: dict[str, Any]) -> None:
    """Refuses a folder that holds a run with other settings, or something else.

    Raises:
        UserError: Names the first settings that differ.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir: {path} is a file; choose another run_dir")
    if not (path / "config.yaml").exists():
        # A kill during the very first write leaves no more than these.
        if path.exists() and {x.name for x in path.iterdir()} - {".config.yaml.tmp", LOCK}:
            raise UserError(
                f"run_dir: {path} is not empty and holds no run; choose another run_dir"
            )
        return
    try:
        old = identity(read_yaml(path / "config.yaml"))
    except Exception as error:  # a missing section, or one that is none
        reason = error if isinstance(error, UserError) else repr(error)
        raise UserError(
            f"run_dir: {path} holds a config.yaml that is not one of a run ({reason}); choose "
            "another run_dir"
        ) from error
    changed = list(differences(old, identity(config)))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"run_dir: {path} holds a run with other settings ({'; '.join(changed[:3])}{more}); "
            "choose another run_dir, or delete that one"
        )


def environment() -> dict[str, Any]:
    """Source and versions, for ``manifest.json``."""
    import torch
    import torchvision

    return {
        "git": git_state(),
        "versions": {
            "adq_train": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
    }


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


def _open_lock(folder: Path) -> int:
    """Opens the file that whoever writes to a folder has locked."""
    return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes a folder that several runs share and holds it alone, waiting for others first.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_lock(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another run that is working in %s", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
