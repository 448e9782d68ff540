"""Standard output and error that a program survives: lost, closed, or without room for an Ω."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys

PLAIN = {
    "Ω": "Omega", "α": "alpha", "→": "->", "±": "+/-", "×": "x", "…": "...", "–": "-", "—": "-",
    "−": "-", "≥": ">=", "≤": "<=", "·": "*", "■": "#", "█": "#", "═": "=",
    "‘": "'", "’": "'", "“": '"', "”": '"', "²": "^2",
}  # fmt: skip


class Descriptor(io.RawIOBase):
    """A file descriptor that takes every byte, also when nobody reads them any more.

    Args:
        descriptor: To write to.

    Attributes:
        error: Why output was lost, the first time; None while none was.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        """It is for writing."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self.descriptor

    def isatty(self) -> bool:
        """Whether a person is looking."""
        return self.error is None and os.isatty(self.descriptor)

    def write(self, data: object) -> int:
        """Writes what it can; the rest is lost without an error."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += os.write(self.descriptor, view[done:])
            except BlockingIOError:  # another program made the terminal non-blocking
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.error = error
        return len(view)


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands in the output for characters that its encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in text), error.end


def survive() -> tuple[Descriptor, Descriptor]:
    """Replaces standard output and error; gives what they write to.

    A stream that was closed before the program began goes nowhere, and its number is taken, so
    that no file of the program gets it.
    """
    codecs.register_error("adq-plain", plain)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is this one
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
    made = []
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw, old = Descriptor(number), getattr(sys, name)
        text = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=getattr(old, "encoding", None) or "utf-8",
            errors="adq-plain",
            line_buffering=number == 2 or raw.isatty(),
        )
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
        made.append(raw)
    return made[0], made[1]
