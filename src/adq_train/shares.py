"""Shares as users write them: ``0.1x`` is a tenth."""

from __future__ import annotations

import re
from fractions import Fraction

SHARE = re.compile(r"[0-9]+(\.[0-9]+)?x")


def share(text: str, of: str = "") -> Fraction:
    """Reads a share.

    Args:
        text: ``0.1x``.
        of: What it is one of, for the message: ``of the float model's``.

    Raises:
        ValueError: The text is something else, or the share is not in (0, 1].
    """
    if not SHARE.fullmatch(text) or not 0 < Fraction(text[:-1]) <= 1:
        raise ValueError(
            f"must be a number, or a share {of}{' ' * bool(of)}such as 0.1x (more than 0x, at "
            f"most 1x), got {text!r}"
        )
    return Fraction(text[:-1])
