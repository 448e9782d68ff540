"""The rows of a sensitivity table that an interrupted run has measured."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from adq_train.artifacts import LayerSensitivity, SensitivityTable
from adq_train.errors import UserError
from adq_train.storage.files import write_text
from adq_train.storage.stamps import origin_problem, stamped
from adq_train.training.distributed import ALONE, Ranks

log = logging.getLogger(__name__)


class PartialTable:
    """A file that holds the finished rows, written whole after each of them.

    Args:
        path: The file.
        key: Digest of everything that the rows depend on; rows with another one are not used.
        metric: The metric's name.
        bit_widths: The candidates.
        ranks: The processes of the run. Rank 0 alone writes, and reads for all of them.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        metric: str,
        bit_widths: tuple[int, ...],
        ranks: Ranks = ALONE,
    ) -> None:
        self.path, self.key, self.ranks = path, key, ranks
        self.table = SensitivityTable(metric, bit_widths, self._read())

    def append(self, row: LayerSensitivity) -> None:
        """Adds a row and writes the file."""
        rows = (*self.table.layers, row)
        self.table = SensitivityTable(self.table.metric, self.table.bit_widths, rows)
        if not self.ranks.is_main:
            return
        write_text(self.path, stamped(self.table.to_json(), self.key))

    def _read(self) -> tuple[LayerSensitivity, ...]:
        """The rows that an earlier run left, if they can be used here."""
        path = self.path
        content = self.ranks.broadcast(lambda: path.read_bytes() if path.exists() else None)
        if content is None:
            return ()
        try:
            text = content.decode()
            table = SensitivityTable.from_json(text)
        except (UnicodeDecodeError, UserError) as error:
            log.warning("%s cannot be read (%s); not used", self.path, error)
            return ()
        if origin_problem(json.loads(text), self.key):
            log.warning("%s belongs to another model or other settings; not used", self.path)
            return ()
        return table.layers
