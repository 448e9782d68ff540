"""Values on the command line as people type them, for Hydra's grammar, which refuses some.

Imports nothing heavy.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from adq_train.settings.schema import is_path

FUNCTIONS = re.compile(
    r"(choice|range|interval|glob|shuffle|sort|tag|extend_list|int|float|str|bool|json_str)\s*\("
)


def parse(text: str) -> Override:
    """An override as Hydra reads it.

    Raises:
        HydraException: It does not.
    """
    return OverridesParser.create().parse_override(text)


def quote(text: str) -> str:
    """A text as one value of Hydra's grammar."""
    inner = re.sub(r"(\\*)'", r"\1\1\\'", text)
    ending = len(inner) - len(inner.rstrip("\\"))
    return f"'{inner}{inner[len(inner) - ending :]}'"


def how_to_write(key: str, value: str) -> str:
    """What to type in a shell for a value that is one text."""
    return shlex.quote(f"{key}={quote(value)}" if "'" in value else f'{key}="{value}"')


def quoted(overrides: Sequence[str]) -> list[str]:
    """The overrides, with quotes where the grammar refuses a value that can mean one thing only.

    A comma stays the sign of a sweep, unless a file or folder has that name. Numbers and words that
    name a file stay as they were typed: ``run_dir=007``.
    """
    return [_quoted(text) for text in overrides]


def _quoted(text: str) -> str:
    """One override, quoted where that is needed and unambiguous."""
    key, _, value = text.partition("=")
    if not value or value[0] in "'\"[{" or "${" in value or FUNCTIONS.match(value):
        return text
    one = f"{key}={quote(value)}"
    try:
        override = parse(text)
    except HydraException:
        if "," in value and not _exists(value):
            parts = value.split(",")
            if not all(map(_exists, parts)):
                return text
            one = f"{key}={','.join(map(quote, parts))}"
        return one if _parses(one) else text
    if not is_path(key.lstrip("+")) or value.lower() == "null":
        return text
    if override.is_sweep_override():
        return one if _exists(value) else text
    return text if str(override.value()) == value else one


def _exists(value: str) -> bool:
    """Whether a value names a file or a folder."""
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _parses(text: str) -> bool:
    """Whether Hydra can read an override."""
    try:
        parse(text)
    except HydraException:
        return False
    return True
