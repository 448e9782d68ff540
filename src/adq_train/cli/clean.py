"""``adq-clean``: removes what finished runs no longer need."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from adq_train.cli.arguments import read
from adq_train.printable import one_line
from adq_train.run.cleaning import clean
from adq_train.storage.files import typed_path

HELP = """adq-clean: remove what finished runs no longer need, and say how many bytes.

Examples
  adq-clean outputs dry_run=true
  adq-clean outputs

Usage
  adq-clean FOLDER [setting=value ...]

Removed are previous checkpoints, locks and what killed processes left; the
checkpoints of trained float models in FOLDER/shared; and float models that no
run names, where no run is unfinished. What evaluates, exports or starts another
run stays. Unfinished runs are left alone.

Settings, with their defaults
  dry_run=false             only tell what would go
"""


@dataclass(frozen=True)
class CleanSettings:
    """The command line of ``adq-clean``."""

    path: str
    dry_run: bool = False


def main() -> None:
    """Does what the command line says."""
    settings = read(CleanSettings, HELP)
    freed: Counter[str] = Counter()
    count = 0
    for x in clean(typed_path(settings.path), settings.dry_run):
        print(f"{x.bytes:>14,}  {one_line(str(x.path))}")
        freed[x.why] += x.bytes
        count += 1
    verb = "would be freed" if settings.dry_run else "freed"
    for why, size in freed.items():
        print(f"{size:>14,}  bytes {why}")
    print(f"{sum(freed.values()):>14,}  bytes {verb}, {count} files")
