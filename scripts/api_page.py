"""Writes docs/api.md: what `import adq_train` offers, from its signatures and docstrings.

python scripts/api_page.py            # writes the page
python scripts/api_page.py --check    # exit code 1 where it is not up to date
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

import adq_train

PAGE = Path(__file__).parents[1] / "docs/api.md"
HEAD = """# Python API

Written by `scripts/api_page.py` from the docstrings; [python.md](python.md) has a whole example.
"""
# Headings of Google's docstrings, and what they become.
SECTIONS = ("Args", "Returns", "Raises", "Yields", "Attributes")


def entry(name: str) -> str:
    """The Markdown of one name."""
    thing = getattr(adq_train, name)
    signature = str(inspect.signature(thing)).replace("'", "")
    signature = re.sub(r"<class (?:\w+\.)*(\w+)>", r"\1", signature)
    lines = []
    inside = False
    for line in (inspect.getdoc(thing) or "").splitlines():
        title = line.removesuffix(":")
        if line.endswith(":") and title in SECTIONS:
            inside = True
            lines += [f"**{title}**", ""]
        elif inside and re.match(r"    \w.*?: ", line):
            what, _, text = line.strip().partition(": ")
            lines.append(f"- `{what}`: {text}")
        else:
            lines.append(f"  {line.strip()}" if inside and line else line)
    text = re.sub(r":(?:func|class|mod|meth):`~?\.?([\w.]+)`", r"`\1`", "\n".join(lines))
    text = re.sub(r"``([^`]+)``", r"`\1`", text).rstrip()
    return f"## `adq_train.{name}`\n\n```python\n{name}{signature}\n```\n\n{text}\n"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(entry(name) for name in adq_train.__all__)])


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--check", action="store_true")
    options = words.parse_args()
    if options.check:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current != page():
            sys.exit(f"{PAGE} is not up to date; run python scripts/api_page.py")
        return
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
