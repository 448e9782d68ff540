"""Names and messages of other people, as a terminal may show them. Imports nothing heavy."""

from __future__ import annotations

import logging
import re

# C0 and C1 control characters, and those that reorder or break a line; tab and line end apart.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""A text that a terminal shows and does not obey: ``\x1b`` instead of an escape character.

    Args:
        text: Of one or more lines; line ends and tabs stay.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """The same of a name, whose line ends and tabs are written out too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class PrintableFormatter(logging.Formatter):
    """Formats records of the log as printable text."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        return printable(super().format(record))
