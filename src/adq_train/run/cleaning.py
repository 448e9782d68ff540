"""What finished runs no longer need: found, told, and removed; unfinished runs are left alone.

Files go one by one, under the lock of their folder, and none of them is needed to continue, to
evaluate or to export: a kill at any moment leaves less to remove and nothing broken.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adq_train.errors import UserError
from adq_train.run.folder import is_done
from adq_train.run.manifest import read_manifest
from adq_train.storage.files import TEMPORARY
from adq_train.storage.locks import LOCK, FolderLock

SHARED = "shared"
SUMS = "SHA256SUMS"
# Of a finished run: what only a training that goes on would read.
OF_RUNS = ("checkpoints/previous.pt", "sensitivity.partial.json")
# Of a finished float model, whose weights are in model.safetensors.
OF_FLOAT_MODELS = tuple(f"checkpoints/{x}" for x in ("last.pt", "previous.pt", "best.pt", SUMS))
WHOLE_FLOAT_MODEL = (*OF_FLOAT_MODELS, "model.safetensors", "metrics.jsonl", "depends_on.json")


@dataclass(frozen=True)
class Leftover:
    """A file that nobody needs.

    Attributes:
        path: The file.
        why: In a few words.
        bytes: That its removal frees; 0 where it has another name.
    """

    path: Path
    why: str
    bytes: int


def runs_below(root: Path) -> Iterator[Path]:
    """The folders of runs; links are not followed."""
    for place, names, files in os.walk(root):
        if "config.yaml" in files:
            names.clear()
            yield Path(place)
        names[:] = sorted(x for x in names if x != SHARED)


def finished(path: Path) -> bool:
    """Whether all of a run is done; one whose state cannot be read is not."""
    try:
        return is_done(path)
    except UserError:
        return False


def leftovers(root: Path) -> Iterator[tuple[Path, list[Leftover]]]:
    """What may go, by the folder whose lock is to be held meanwhile.

    A shared float model may go where no run below ``root`` names it and none is unfinished.
    """
    runs = list(runs_below(root))
    done = [path for path in runs if finished(path)]
    used: set[str] = set()
    open_runs = len(done) < len(runs)
    for path in runs:
        try:
            models = (read_manifest(path).get("float_models") or {}).values()
            used |= {str(x["shared"]) for x in models}
        except UserError:
            open_runs = True  # who knows what it needs
    for path in done:
        yield path, list(_found(path, OF_RUNS, "of a finished run"))
    for path in sorted((root / SHARED).glob("pretrain-*")):
        if not path.is_dir() or path.is_symlink():
            continue
        if not (path / "model.safetensors").is_file() and any(path.glob("checkpoints/*.pt")):
            continue  # still in training
        if path.name in used or open_runs:
            yield path, list(_found(path, OF_FLOAT_MODELS, "of a trained float model"))
        else:
            yield path, list(_found(path, WHOLE_FLOAT_MODEL, "of a float model that no run names"))


def _found(folder: Path, names: tuple[str, ...], why: str) -> Iterator[Leftover]:
    inside, files = [folder / name for name in names], {}
    for place in (folder, folder / "checkpoints"):
        if place.is_dir() and not place.is_symlink():
            inside += [x for x in sorted(place.iterdir()) if TEMPORARY.fullmatch(x.name)]
    inside.append(folder / LOCK)
    for path in inside:
        if not (path.is_symlink() or path.parent.is_symlink()) and path.is_file():
            files[path] = path.stat()
    names_of = Counter(x.st_ino for x in files.values())
    for path, x in files.items():
        # A file with two names, such as best.pt and last.pt, is freed with the last of them.
        freed = x.st_size if names_of.pop(x.st_ino, 0) == x.st_nlink else 0
        yield Leftover(path, why, freed)


def clean(root: Path, dry_run: bool = False) -> Iterator[Leftover]:
    """Removes what finished runs below a folder no longer need, and tells of each file.

    Args:
        root: Such as ``outputs``.
        dry_run: Whether nothing is removed.

    Raises:
        UserError: There is no such folder, or a file cannot be removed.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give that of the runs, such as outputs")
    for folder, found in leftovers(root):
        if dry_run or (not found and any(x.is_file() for x in folder.rglob("*"))):
            yield from found
            continue
        lock = FolderLock(folder)
        try:
            lock.take()
        except BlockingIOError:
            continue  # somebody is at work here
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror})") from error
        try:
            # A run may have begun meanwhile that needs what it found here.
            for x in dict(leftovers(root)).get(folder, []):
                _remove(x.path)
                yield x
            _remove(folder / LOCK)  # which taking it has made
        finally:
            lock.release()
        for place in (folder / "checkpoints", folder):  # where nothing is left in them
            with contextlib.suppress(OSError):
                place.rmdir()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path} ({error.strerror})") from error
