"""Folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from adq_train.errors import UserError

log = logging.getLogger(__name__)

LOCK = ".lock"


class FolderLock:
    """A lock on a folder, and on the file ``.lock`` in it; it ends with the process.

    The folder's keeps others out where somebody deletes the file. The file's is for network file
    systems, which lock no folders; there a holder can only notice that the file was replaced.

    Args:
        folder: Must be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: list[int] = []

    def take(self, wait: bool = False) -> None:
        """Locks it.

        Args:
            wait: For whoever has it.

        Raises:
            BlockingIOError: Another has it, and nobody waits.
            OSError: The file cannot be made.
        """
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            self._held.append(os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY))
            try:
                fcntl.flock(self._held[0], how)
            except BlockingIOError:
                raise
            except OSError as error:  # a file system that locks no folders
                log.debug("%s itself cannot be locked (%s)", self.folder, error)
            while True:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                self._held.append(os.open(self.folder / LOCK, flags, 0o644))
                fcntl.flock(self._held[1], how)
                if self._same() is True:
                    return
                os.close(self._held.pop())  # deleted between opening and locking
        except BaseException:
            self.release()
            raise

    def require(self) -> None:
        """Checks that nobody has put another file in the place of the locked one.

        Raises:
            UserError: It is another file, so another process may write here.
        """
        if self._same() is False:
            raise UserError(
                f"{self.folder / LOCK} was replaced while this run was writing here, so another "
                "process may do so too; end one of them, and the same command continues"
            )

    def _same(self) -> bool | None:
        """Whether the locked file is the one with that name; None where there is none."""
        try:
            named = os.lstat(self.folder / LOCK)
        except OSError:
            return None
        return os.path.samestat(named, os.fstat(self._held[1]))

    def release(self) -> None:
        """Gives it up."""
        while self._held:
            os.close(self._held.pop())


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes a folder that several runs share and holds it alone, waiting for others first.

    Raises:
        UserError: It cannot be made.
    """
    lock = FolderLock(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.take()
        except BlockingIOError:
            log.info("waiting for another run that is working in %s", folder)
            lock.take(wait=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()
