"""The images of a folder; what is left out of it is said."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adq_train.data.pictures import SUFFIXES, shown
from adq_train.errors import UserError

log = logging.getLogger(__name__)

Sample = tuple[str, int]  # path, class

# Folders that programs leave behind; like names with a dot they are nobody's classes.
CLUTTER = ("__MACOSX", "@eaDir")


@dataclass(frozen=True)
class Listing:
    """Classes by the names of their folders, in order, and the images with their class."""

    classes: tuple[str, ...]
    samples: tuple[Sample, ...]


@dataclass
class _LeftOut:
    """What a folder holds besides images: hidden entries, other files, links in a circle."""

    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)

    def visible(self, folder: str, names: Sequence[str]) -> list[str]:
        """The names that are not hidden; the rest is noted."""
        self.hidden += [f"{folder}/{name}" for name in names if _is_hidden(name)]
        return [name for name in names if not _is_hidden(name)]

    def report(self) -> None:
        """One line in the log for each kind."""
        for paths, what in (
            (self.hidden, "hidden"),
            (self.others, f"not images of a class ({' '.join(SUFFIXES)})"),
            (self.circles, "links to a folder around them"),
        ):
            if paths:
                more = ", …" if len(paths) > 3 else ""
                names = ", ".join(map(shown, sorted(paths)[:3])) + more
                log.warning("left out %d entries that are %s: %s", len(paths), what, names)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in CLUTTER


def _fail(error: OSError) -> None:
    """What os.walk calls for a folder that cannot be read, and would leave out otherwise.

    Raises:
        UserError: Names the folder.
    """
    raise UserError(
        f"the folder {shown(error.filename)} cannot be read ({error.strerror})"
    ) from error


def _walk(folder: str, left_out: _LeftOut) -> Iterator[str]:
    """The images below a folder, sorted by folder, then by name; follows links, not in a circle."""
    found = []
    real, named = Path(folder).resolve(), Path(folder).absolute()
    parents = (real, *real.parents, *named.parents)
    inside = {folder: frozenset(map(_identity, parents))}  # itself and what is around it
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_fail):
        around, entered = inside.pop(place), []
        for name in left_out.visible(place, folders):
            path = f"{place}/{name}"
            identity = _identity(path)
            if identity in around:
                left_out.circles.append(path)
            else:
                entered.append(name)
                inside[path] = around | {identity}
        folders[:] = entered
        found.append((place, left_out.visible(place, files)))
    for place, files in sorted(found):
        for name in sorted(files):
            if name.lower().endswith(tuple(SUFFIXES)):
                yield f"{place}/{name}"
            else:
                left_out.others.append(f"{place}/{name}")


def _identity(folder: str | Path) -> tuple[int, int]:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino


def images_below(folder: Path) -> list[str]:
    """All images in a folder and those below it.

    Raises:
        UserError: A folder cannot be read.
    """
    left_out = _LeftOut()
    found = list(_walk(str(folder), left_out))
    left_out.report()
    return found


def list_images(folder: Path) -> Listing:
    """Lists a folder of classes in the order of torchvision's ``ImageFolder``.

    Hidden entries (names with a dot at their start, ``__MACOSX``, ``@eaDir``), files with other
    suffixes and links in a circle are left out, with a line in the log. A link that leads nowhere
    is listed like any other image that cannot be read.

    Raises:
        UserError: The folder is missing or cannot be read, or a class in it has no images.
    """
    left_out = _LeftOut()
    try:
        names = left_out.visible(str(folder), sorted(x.name for x in folder.iterdir()))
    except OSError as error:
        raise _not_classes(folder, error.strerror or str(error)) from error
    classes = [name for name in names if (folder / name).is_dir()]
    left_out.others += [str(folder / name) for name in names if name not in classes]
    samples = []
    for target, name in enumerate(classes):
        images = list(_walk(f"{folder}/{name}", left_out))
        if not images:
            raise _not_classes(folder, f"the class {shown(name)} has no image")
        samples += [(path, target) for path in images]
    if not classes:
        raise _not_classes(folder, "there is no folder in it")
    left_out.report()
    return Listing(tuple(classes), tuple(samples))


def _not_classes(folder: Path, reason: str) -> UserError:
    return UserError(
        f"data.root: {shown(folder)} is not a folder of classes with images ({reason}); expected "
        "train/<class>/*.jpg and val/<class>/*.jpg, or <class>/*.jpg alone, under data.root"
    )
