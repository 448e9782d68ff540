"""Checkpoints that survive a kill at any moment, and that cannot run code when they are read."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from adq_train.errors import UserError
from adq_train.storage.files import sha256, write_text, written_whole

log = logging.getLogger(__name__)


class CheckpointFolder:
    """``last.pt``, the one before it, and ``best.pt``, with their SHA-256 in ``SHA256SUMS``.

    ``SHA256SUMS`` lists a new file before that file takes its name, so that at every moment at
    least one checkpoint is both in place and listed.

    Args:
        folder: Made when the first checkpoint is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: dict[str, Any], best: bool = False) -> None:
        """Writes ``last.pt`` and keeps its predecessor as ``previous.pt``.

        Args:
            state: Tensors and plain types.
            best: Whether to keep a copy as ``best.pt``.

        Raises:
            UserError: The disk is full; the checkpoints that were there still are.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror}") from error
        last = self.folder / "last.pt"
        known = self._sums()
        before = (self._digest("last.pt"), "last.pt")
        with written_whole(last) as temporary:
            _write(state, temporary)
            digest = sha256(temporary)
            moving = [(d, "previous.pt") for d, name in known if name == "last.pt"]
            self._write_sums([*known, (digest, "last.pt"), (digest, "best.pt"), *moving])
            if best:
                # Before last.pt: its state says that this was the best, and a resume believes it.
                with written_whole(self.folder / "best.pt") as copy:
                    _link(temporary, copy)
            if before in known:  # a damaged one must not take the place of an intact previous.pt
                last.replace(self.folder / "previous.pt")
        self._write_sums([x for x in self._sums() if x == (self._digest(x[1]), x[1])])

    def keep(self, name: str, state: dict[str, Any]) -> None:
        """Writes a state that does not change beside the checkpoints, unless it is there.

        Args:
            name: Of the file, without its ending.
            state: Tensors and plain types.

        Raises:
            UserError: The disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = f"{name}.pt"
        known = self._sums()
        if (self._digest(file), file) in known:
            return
        with written_whole(self.folder / file) as temporary:
            _write(state, temporary)
            self._write_sums([*known, (sha256(temporary), file)])

    def load(self, key: str, names: tuple[str, ...] = ("last", "previous")) -> Any | None:
        """The newest intact checkpoint of the run that ``key`` stands for, or None.

        Args:
            key: What the run depends on; a checkpoint with another key is left alone.
            names: Which files to try, in order.

        Returns:
            The saved state, with tensors on the CPU.
        """
        listed = {digest for digest, _ in self._sums()}
        for name in names:
            path = self.folder / f"{name}.pt"
            if not path.exists():
                continue
            if sha256(path) not in listed:
                log.warning("%s is damaged (its SHA-256 is not in SHA256SUMS); not used", path)
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                log.warning("%s cannot be read (%s); not used", path, error)
                continue
            if not isinstance(state, dict) or state.get("key") != key:
                log.warning("%s belongs to a run with other settings; not used", path)
                continue
            return state
        return None

    def _sums(self) -> list[tuple[str, str]]:
        """The (digest, name) lines of ``SHA256SUMS``."""
        path = self.folder / "SHA256SUMS"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = text.splitlines()
        pairs = [line.split(maxsplit=1) for line in lines]
        return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]

    def _write_sums(self, sums: list[tuple[str, str]]) -> None:
        lines = dict.fromkeys(f"{digest}  {name}\n" for digest, name in sums)
        write_text(self.folder / "SHA256SUMS", "".join(lines))

    def _digest(self, name: str) -> str | None:
        path = self.folder / name
        return sha256(path) if path.exists() else None


class Rhythm:
    """When to save within an epoch.

    Args:
        steps: After every so many steps of an epoch; None: not by steps.
        minutes: When so much time has passed since the last checkpoint; None: not by time.
    """

    def __init__(self, steps: int | None = None, minutes: float | None = None) -> None:
        self.steps, self.minutes = steps, minutes
        self.saved()

    def saved(self) -> None:
        """Starts to count the minutes anew."""
        self.since = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after step number ``step`` of an epoch, from 1."""
        by_steps = self.steps is not None and step % self.steps == 0
        waited = time.monotonic() - self.since
        return by_steps or (self.minutes is not None and waited >= 60 * self.minutes)


def _write(state: dict[str, Any], path: Path) -> None:
    """Saves a state; where the disk refuses, its own error is raised, not that of the zip writer.

    Raises:
        OSError: What the disk said.
    """
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
