"""Files that are whole or not there: written aside, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from adq_train.errors import UserError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; it takes its name once the block succeeds.

    Raises:
        UserError: The disk is full or the folder cannot be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            if temporary.stat().st_nlink > 1:  # a kill left it as the second name of a good file
                temporary.unlink()
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with written_whole(path) as temporary:
        # File names may hold bytes that are no UTF-8; they are shown as \\udcxx.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def oddity(path: Path, most_bytes: int) -> str | None:
    """Why a stranger's file is not to be read; None for a regular one of at most so many bytes.

    A pipe would never end, and a link could lead anywhere.

    Raises:
        FileNotFoundError: There is none.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_size > most_bytes:
        return f"larger than {most_bytes:,} bytes"
    return None


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
