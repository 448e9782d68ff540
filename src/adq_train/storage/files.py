"""Files that are whole or not there: written aside, synced, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from adq_train.errors import UserError

# Nobody can foresee the middle, so nobody can lay a link in its way.
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


def with_home(text: str) -> str:
    """A path as a person types it, ``~`` written out as a shell would; an unknown user's stays."""
    return os.path.expanduser(text)  # noqa: PTH111 (Path's raises for an unknown user)


def typed_path(text: str) -> Path:
    """The same as a path; every program takes its paths from the command line through it."""
    return Path(with_home(text))


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; it takes its name once the block succeeds.

    Where ``path`` is a link, the link is replaced, not followed.

    Raises:
        UserError: The disk is full, the folder cannot be written, or ``path`` is a folder, a
            device or a pipe, which would be replaced; ``path`` is as it was.
    """
    if not path.name or (path.exists() and not path.is_symlink() and not path.is_file()):
        kind = "folder" if path.is_dir() else "device or a pipe"
        raise UserError(f"cannot write {path}: it is a {kind}; give the name of a file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    mine: int | None = None
    try:
        clear_leftovers(path.parent, path.name)
        mine = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(mine, fcntl.LOCK_EX)  # tells it from what a killed run left
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
        if mine is not None:
            os.close(mine)


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


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files that killed runs left in a folder.

    Args:
        folder: Its subfolders are left alone.
        name: Only of the file with this name; None: of all.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = TEMPORARY.fullmatch(entry.name)
            if found and name in (None, found[1]) and not _is_written(Path(entry.path)):
                Path(entry.path).unlink()


def _is_written(temporary: Path) -> bool:
    """Whether a process is still writing a temporary file, or that cannot be told."""
    try:
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return not temporary.is_symlink()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


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


def outward_link(folder: Path) -> Path | None:
    """A link in a folder, or below, that leads out of it; None where there is none."""
    inside = folder.resolve()
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                return path
    return None
