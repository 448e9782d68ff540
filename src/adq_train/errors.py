"""Errors that a user can mend: shown as one message, without a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


class UserError(Exception):
    """Something outside the program is wrong: a file, a folder, a data set, a device."""


class ConfigError(UserError):
    """One or more problems of a configuration, reported together.

    Args:
        problems: One sentence each; each names the field, what it got and what is allowed.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint `` (did you mean 'x'?)`` for the nearest known word, or an empty string."""
    near = get_close_matches(word, list(known), n=5, cutoff=0.6)

    def likeness(x: str) -> tuple[float, int]:
        return SequenceMatcher(None, x, word).ratio(), sum(map(str.__eq__, x, word))

    return f" (did you mean '{max(near, key=likeness)}'?)" if near else ""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line without colours."""
    told = re.sub("\x1b\\[[0-9;]*m", "", str(error)).strip()
    return (told or type(error).__name__).splitlines()[0]
