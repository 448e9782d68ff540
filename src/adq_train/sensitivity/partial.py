"""The rows of a sensitivity table that an interrupted run has measured."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from torch import nn

from adq_train.artifacts import LayerSensitivity, SensitivityTable
from adq_train.errors import UserError
from adq_train.files import write_text

log = logging.getLogger(__name__)


class PartialTable:
    """A file that holds the finished rows, written whole after each of them.

    Args:
        path: The file.
        key: Digest of everything that the rows depend on; rows with another one are not used.
        metric: The metric's name.
        bit_widths: The candidates.
    """

    def __init__(self, path: Path, key: str, metric: str, bit_widths: tuple[int, ...]) -> None:
        self.path, self.key = path, key
        self.table = SensitivityTable(metric, bit_widths, self._read())

    def append(self, row: LayerSensitivity) -> None:
        """Adds a row and writes the file."""
        rows = (*self.table.layers, row)
        self.table = SensitivityTable(self.table.metric, self.table.bit_widths, rows)
        content = {"key": self.key, **json.loads(self.table.to_json())}
        write_text(self.path, json.dumps(content, indent=2) + "\n")

    def _read(self) -> tuple[LayerSensitivity, ...]:
        """The rows that an earlier run left, if they can be used here."""
        if not self.path.exists():
            return ()
        try:
            text = self.path.read_text(encoding="utf-8")
            table = SensitivityTable.from_json(text)
        except (OSError, UnicodeDecodeError, UserError) as error:
            log.warning("%s cannot be read (%s); not used", self.path, error)
            return ()
        if json.loads(text).get("key") != self.key:
            log.warning("%s belongs to another model or other settings; not used", self.path)
            return ()
        return table.layers


def weights_digest(model: nn.Module) -> str:
    """Hexadecimal SHA-256 of all parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
