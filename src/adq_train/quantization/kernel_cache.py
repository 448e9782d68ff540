"""A C file as a shared library: compiled once, and loaded from nowhere that others can write to.

Loading a library runs its code. So the folder that keeps libraries belongs to this user alone, no
other user has a say in the path to it, and a file's name carries the SHA-256 of what it holds,
which is checked before each load.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
# Compiling takes a second or two; a compiler that waits for something would hold a run for ever.
TIMEOUT_SECONDS = 60.0
LARGEST_LIBRARY = 2**24
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class CompilerError(Exception):
    """The library cannot be made, in this folder or in another one."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/adq_train``, or below ``~/.cache``.

    Raises:
        RuntimeError: There is no home folder.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The standard says so: a relative one would be another folder wherever a run is started.
    return (named if named.is_absolute() else Path.home() / ".cache") / "adq_train"


def build(source: Path, folder: Path) -> Path:
    """Compiles a C file to a shared library, unless this very file has been compiled before.

    Args:
        source: The C file.
        folder: Where libraries are kept, named by what they depend on and what they hold.

    Raises:
        CompilerError: No compiler, or it refuses the file, or it does not end.
        OSError: The folder cannot be written, or is not this user's alone.
    """
    compiler = _compiler()
    # Built for this very processor, so a cache that machines share keeps one for each kind.
    machine = f"{platform.machine()} {_processor()}"
    parts = [source.read_text(encoding="utf-8"), *compiler, *FLAGS, machine]
    identity = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    make_private(folder)
    for found in sorted(folder.glob(f"kernels-{identity}-*.so")):
        if is_whole(found):
            return found
        found.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch, "kernels.so")
        _compile([*compiler, *FLAGS, str(source), "-o", str(made)], Path(scratch, "messages"))
        made.chmod(0o700)
        library = folder / f"kernels-{identity}-{hashlib.sha256(made.read_bytes()).hexdigest()}.so"
        with made.open("rb") as written:
            os.fsync(written.fileno())
        made.replace(library)
    return library


def make_private(folder: Path) -> None:
    """Makes a folder that is this user's alone, or makes it so.

    What lies in one that others could write to until now is thrown away.

    Raises:
        OSError: It is another user's, or another user can change the path to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_path(folder)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)
    if status.st_mode & WRITABLE_BY_OTHERS:
        for old in folder.glob("kernels-*"):
            old.unlink()


def check_path(path: Path) -> None:
    """Refuses a path that another user but root can turn elsewhere, with all links on the way.

    Raises:
        OSError: Names the folder or link.
    """
    path = path.absolute()
    for part in (*reversed(path.parents), path):
        status = part.lstat()
        if status.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{part} belongs to another user")
        if stat.S_ISLNK(status.st_mode):
            check_path(part.parent / part.readlink() / path.relative_to(part))
            return
        if part != path and status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise PermissionError(f"every user can write to {part}")


def is_whole(library: Path) -> bool:
    """Whether a library is a file of this user alone and holds what its name says."""
    with contextlib.suppress(OSError):
        # Neither through a link, nor waiting for a pipe.
        handle = os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            own = status.st_uid == os.geteuid() and not status.st_mode & WRITABLE_BY_OTHERS
            if stat.S_ISREG(status.st_mode) and own and status.st_size <= LARGEST_LIBRARY:
                return digest_in_name(library) == hashlib.sha256(file.read()).hexdigest()
    return False


def digest_in_name(library: Path) -> str:
    """The SHA-256 that the name of a library carries."""
    return library.stem.rpartition("-")[2]


def _compiler() -> list[str]:
    """``$CC``, which may hold arguments, or cc, or gcc.

    Raises:
        CompilerError: There is none.
    """
    try:
        wanted = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise CompilerError(f"$CC cannot be read: {error}") from error
    for name, *arguments in (wanted, ["gcc"]):
        if path := shutil.which(name):
            return [path, *arguments]
    raise CompilerError(f"no C compiler ({wanted[0]}) on the PATH")


def _compile(command: list[str], messages: Path) -> None:
    """Runs a compiler in a process group of its own, which ends with it.

    Raises:
        CompilerError: What it says first, or that it takes too long.
    """
    with messages.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(TIMEOUT_SECONDS)
        except BaseException as error:  # Ctrl-C too, which does not reach another session
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                text = f"{command[0]} took over {TIMEOUT_SECONDS:g} seconds"
                raise CompilerError(text) from error
            raise
    if code:
        with messages.open("rb") as output:
            lines = output.read(2**12).decode(errors="replace").strip().splitlines()
        raise CompilerError(lines[0] if lines else f"{command[0]} ended with {code}")


def _processor() -> str:
    """The processor's model and features, as Linux tells them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Feat"))}))
