"""What a file of a run depends on and what it holds, as digests in its field ``stamp``."""

from __future__ import annotations

import hashlib
import json
from typing import Any

STAMP = "stamp"


def digest(content: Any) -> str:
    """Hexadecimal SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stamped(text: str, depends_on: str) -> str:
    """A JSON object with a stamp.

    Args:
        text: The object, without one.
        depends_on: Digest of everything that it was made from.
    """
    content = json.loads(text)
    stamp = {"depends_on": depends_on, "content": _fields(content)}
    return json.dumps({**content, STAMP: stamp}, indent=2) + "\n"


def content_problem(content: dict[str, Any]) -> str | None:
    """Why an object is not what its stamp says, or None; one without a stamp passes."""
    if STAMP not in content:
        return None
    stamp = content[STAMP]
    noted = stamp.get("content") if isinstance(stamp, dict) else None
    if not isinstance(noted, dict):
        return f"{STAMP} is not one"
    found = _fields({key: value for key, value in content.items() if key != STAMP})
    odd = sorted(x for x in found.keys() | noted.keys() if found.get(x) != noted.get(x))
    return f"{', '.join(odd)} changed after it was written" if odd else None


def _fields(content: dict[str, Any]) -> dict[str, str]:
    """A digest of each field, so that one which was edited can be named."""
    return {key: digest(value)[:16] for key, value in content.items()}


def origin_problem(content: dict[str, Any], depends_on: str) -> str | None:
    """Why an object was not made from what ``depends_on`` stands for, or None."""
    stamp = content.get(STAMP)
    if stamp is None:
        return "it has no stamp, so it was not made by this run"
    if not isinstance(stamp, dict) or stamp.get("depends_on") != depends_on:
        return "it was made by another run, or from other settings, data or weights than now"
    return None
