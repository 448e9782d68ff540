"""Float models that several runs share: kept under all that their bits depend on, and verified."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

from adq_train.errors import UserError
from adq_train.run.manifest import environment
from adq_train.settings.schema import Config, float_settings
from adq_train.states import load_state
from adq_train.storage.files import sha256, write_text, written_whole
from adq_train.storage.stamps import STAMP, digest


def float_inputs(
    config: Config, fingerprint: str, device: str, processes: int, checkpoint: str | None = None
) -> dict[str, Any]:
    """Everything that the bits of a float model depend on.

    Args:
        config: With the network and the epochs of this float model.
        fingerprint: Of the data set.
        device: Where it is trained.
        processes: How many train it together.
        checkpoint: SHA-256 of the file that its weights come from.
    """
    here, settings = environment(device), float_settings(config.plain())
    versions = {name: x for name, x in here["versions"].items() if name != "python"}
    # The kernels are not among them: they compute quantizers, and a float model has none.
    return {
        **settings,
        "pretrain": {**settings["pretrain"], "checkpoint": checkpoint},
        "fingerprint": fingerprint,
        "processes": processes,
        "hardware": here["hardware"],
        "cpu_threads": here["cpu_threads"] if here["hardware"].startswith("cpu") else None,
        "versions": versions,
    }


class SharedModel:
    """A folder with one trained float model and what it depends on.

    ``depends_on.json`` holds the inputs, whose digest names the folder, and in its stamp the
    SHA-256 of ``model.safetensors``.

    Args:
        root: Where shared folders are.
        inputs: As :func:`float_inputs` gives them.
        noted: Name of the folder that an earlier start of the run had its model from. It is taken
            where it still holds one, though the run may go on under other conditions than then.
    """

    def __init__(self, root: Path, inputs: dict[str, Any], noted: str | None = None) -> None:
        self.inputs = inputs
        self.key = digest(inputs)
        self.folder = root / f"pretrain-{self.key[:12]}"
        if noted and re.fullmatch(r"pretrain-[0-9a-f]{12}", noted):
            before = root / noted
            self.folder = before if (before / "model.safetensors").exists() else self.folder

    @property
    def weights(self) -> Path:
        """The file with the trained model."""
        return self.folder / "model.safetensors"

    def begin(self) -> None:
        """Writes what the model will depend on."""
        self._write(None)

    def save(self, model: nn.Module) -> None:
        """Writes the trained model.

        Raises:
            UserError: The disk is full.
        """
        with written_whole(self.weights) as temporary:
            try:
                save_model(model, str(temporary))
            except SafetensorError as error:
                raise UserError(f"cannot write {self.weights}: {error}") from error
            # Before the model has its name: a kill here leaves no model without its digest.
            self._write(sha256(temporary))

    def load(self, model: nn.Module) -> None:
        """Gives a model the trained weights.

        Raises:
            UserError: The file is damaged, or another model's; it is named.
        """
        problem = self._problem()
        if problem is None:
            try:
                load_state(model, load_file(self.weights))
            except (SafetensorError, RuntimeError, OSError) as error:
                problem = " ".join(str(error).split())
        if problem:
            raise UserError(
                f"{self.weights} is damaged or another run's ({problem}); delete it, and the same "
                "command trains it anew"
            )

    def _problem(self) -> str | None:
        """Why the file is not the model that was trained for this folder, or None."""
        try:
            content = json.loads((self.folder / "depends_on.json").read_text(encoding="utf-8"))
            noted = content.pop(STAMP)[self.weights.name]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return f"depends_on.json beside it cannot be read: {error!r}"
        if f"pretrain-{digest(content)[:12]}" != self.folder.name:
            return "depends_on.json beside it is of another folder, or was edited"
        if sha256(self.weights) != noted:
            return "its SHA-256 is not the one in depends_on.json"
        return None

    def _write(self, weights: str | None) -> None:
        content = {**self.inputs, STAMP: {self.weights.name: weights}}
        write_text(self.folder / "depends_on.json", json.dumps(content, indent=2) + "\n")
