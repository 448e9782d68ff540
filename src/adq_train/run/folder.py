"""The folder of a run: its identity, its state, its lock, and the artifacts in it."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from adq_train.artifacts import (
    A,
    Artifact,
    BitAllocation,
    LevelCounts,
    NotNegative,
    RunResult,
    SensitivityTable,
)
from adq_train.errors import UserError
from adq_train.printable import PrintableFormatter
from adq_train.run.artifact_files import (
    ARTIFACTS,
    depends_on,
    origin,
    read,
    read_bits,
    take,
)
from adq_train.run.manifest import differences, note_float_model, read_manifest, write_manifest
from adq_train.settings.schema import Config, Content, identity, settings_where
from adq_train.storage.decoding import decode
from adq_train.storage.files import TEMPORARY, clear_leftovers, outward_link, write_text
from adq_train.storage.locks import LOCK, FolderLock
from adq_train.storage.stamps import digest, stamped
from adq_train.storage.yaml_files import read_yaml

if TYPE_CHECKING:  # adq-report reads runs without torch
    from adq_train.training.distributed import Ranks

log = logging.getLogger(__name__)


def input_files(config: dict[str, Any]) -> dict[str, Path]:
    """The files that a configuration names besides ``pretrain.checkpoint``, by setting."""
    named = {name: name.split(".") for name in settings_where(lambda x: x.path is Content.INPUT)}
    values = {name: config[section].get(key) for name, (section, key) in named.items()}
    return {name: Path(x) for name, x in values.items() if x and Path(x).is_file()}


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

    def __init__(self, path: Path, config: Config, ranks: Ranks | None = None) -> None:
        from adq_train.training.distributed import ALONE

        ranks = ranks or ALONE
        self.path = path
        self.config = config.plain()
        self.ranks = ranks
        self.origin = digest(identity(self.config))
        self.stage_name = "setup"
        self.seconds: dict[str, float] = {}
        if ranks.is_main:
            check_same_run(path, self.config)

    def __enter__(self) -> RunFolder:
        if self.ranks.is_main:
            self._open()
        return self

    def _open(self) -> None:
        """Takes the lock and writes what a run begins with."""
        existed = self.path.exists()
        self._lock = FolderLock(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
        except BlockingIOError as error:
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
            require_no_way_out(self.path)
            for folder in (self.path, self.path / "checkpoints", self.path / "plots"):
                clear_leftovers(folder)
            write_text(self.path / "config.yaml", OmegaConf.to_yaml(self.config))
            self.seconds = (read_status(self.path) or {}).get("seconds") or {}
            self._write_status("running")
        except BaseException:
            self._lock.release()
            if not existed:
                with contextlib.suppress(OSError):
                    (self.path / LOCK).unlink()
                    self.path.rmdir()
            raise
        self.log_file = logging.FileHandler(
            self.path / "train.log", encoding="utf-8", errors="backslashreplace"
        )
        self.log_file.setFormatter(PrintableFormatter("%(asctime)s %(levelname)-7s %(message)s"))
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
            self._lock.release()

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

    def save(self, name: str, artifact: Artifact, of: Artifact | None = None) -> None:
        """Writes a stage's value as JSON, whole or not at all, with a stamp.

        Args:
            name: Of the file.
            artifact: The value.
            of: The value that it was made from, besides :attr:`origin`.
        """
        if self.ranks.is_main:
            self._lock.require()
            source = depends_on(self.origin, of)
            write_text(self.path / name, stamped(artifact.to_json(), source))

    def load(self, name: str, kind: type[A], of: Artifact | None = None) -> A | None:
        """The value that an earlier start left, or None.

        Args:
            name: Of the file.
            kind: Of the value.
            of: The value that it must have been made from.

        Raises:
            UserError: The file is damaged, was edited or is another run's; it is named.
        """
        path = self.path / name
        content = self.ranks.broadcast(lambda: path.read_bytes() if path.exists() else None)
        if content is None:
            return None
        return take(path, content, kind, depends_on(self.origin, of))

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """Notes what the run begins with; see :func:`~.manifest.write_manifest`.

        Raises:
            UserError: The data set, the float checkpoint or another file has changed since.
        """
        if self.ranks.is_main:
            write_manifest(self.path, facts)

    def goes_on_with(
        self, stage: str, fingerprint: str, weights: str, shared: str | None = None
    ) -> None:
        """Notes a float model; that of ``pretrain`` is what all later values are made from.

        Args:
            stage: ``pretrain`` or ``teacher``.
            fingerprint: Of the data set.
            weights: Digest of the model's parameters and buffers.
            shared: Name of the shared folder that it is from.

        Raises:
            UserError: The run began with another one.
        """
        if stage == "pretrain":
            self.origin = origin(identity(self.config), fingerprint, weights)
        if self.ranks.is_main:
            note_float_model(self.path, stage, weights, shared)

    def float_model(self, stage: str) -> str | None:
        """Name of the shared folder that an earlier start had its float model from, or None."""

        def noted() -> str | None:
            if not (self.path / "manifest.json").exists():
                return None
            models = read_manifest(self.path).get("float_models") or {}
            name: str | None = models.get(stage, {}).get("shared")
            return name

        return self.ranks.broadcast(noted)

    def _write_status(self, state: str, error: str | None = None) -> None:
        if not self.ranks.is_main:
            return
        self._lock.require()
        stage = None if state == "done" else self.stage_name
        content = {"state": state, "stage": stage, "error": error, "seconds": self.seconds}
        write_text(self.path / "status.json", json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class _Status:
    state: str
    stage: str | None = None
    error: str | None = None
    seconds: dict[str, NotNegative] | None = None


def read_status(path: Path) -> dict[str, Any] | None:
    """The content of ``status.json``, or None where there is none.

    Raises:
        UserError: It is damaged; the field is named.
    """
    file = path / "status.json"
    try:
        status: Any = json.loads(file.read_text(encoding="utf-8"))
        decode(_Status, status)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); delete it, and the run's command finds out what is "
            "done"
        ) from error
    found: dict[str, Any] = status
    return found


def is_done(path: Path) -> bool:
    """Whether all stages of a run are done; says which file is missing where one is.

    Raises:
        UserError: ``status.json`` is damaged.
    """
    if (read_status(path) or {}).get("state") != "done":
        return False
    missing = [x for x in (*ARTIFACTS, "manifest.json") if not (path / x).exists()]
    if missing:
        log.info("the run in %s was done, but %s is missing", path, ", ".join(missing))
    return not missing


def origin_of(path: Path, config: dict[str, Any]) -> str | None:
    """What the values in a folder must have been made from; None for a run without stamps.

    Raises:
        UserError: The manifest is missing or damaged.
    """
    manifest = read_manifest(path)
    noted = (manifest.get("float_models") or {}).get("pretrain")
    if noted is None:
        return None
    return origin(identity(config), manifest["data"]["fingerprint"], noted["sha256"])


def read_values(
    path: Path, config: dict[str, Any]
) -> tuple[SensitivityTable, BitAllocation, LevelCounts, RunResult]:
    """What the stages of a finished run have handed over.

    Args:
        path: The run's folder.
        config: Its resolved configuration.

    Raises:
        UserError: A file is missing, damaged, was edited or is another run's; it is named.
    """
    source = origin_of(path, config)
    table, allocation = read_bits(path, config, source)
    made_from = source and depends_on(source, allocation)
    levels = read(path / "levels.json", LevelCounts, made_from)
    result = read(path / "result.json", RunResult, made_from)
    return table, allocation, levels, result


def require_no_way_out(path: Path) -> None:
    """Refuses a folder with a link that would lead a write out of it.

    Raises:
        UserError: Names the link.
    """
    link = outward_link(path)
    if link is not None:
        raise UserError(
            f"run_dir: {link} is a link that leads out of the run's folder, where a run does not "
            "write; delete it, or choose another run_dir"
        )


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
        names = [x.name for x in path.iterdir()] if path.exists() else []
        if any(x != LOCK and not TEMPORARY.fullmatch(x) for x in names):
            raise UserError(
                f"run_dir: {path} is not empty and holds no run; choose another run_dir"
            )
        return
    try:
        old = identity(read_yaml(path / "config.yaml"))
        if not {"trainer", "data"} <= old.keys():  # which a run of any version has
            raise KeyError("trainer")
    except Exception as error:  # a missing section, or no settings at all
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
