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
from adq_train.states import load_state
from adq_train.storage.files import sha256, write_text, written_whole
from adq_train.storage.stamps import STAMP, digest

# Settings of the trainer that float training does not look at, or that change when and where it
# runs. Every other one, and what is added to the section later, is part of a float model's key.
# The kernels are not: they compute quantizers, and a float model has none.
NOT_FOR_FLOAT_TRAINING = (
    "epochs",
    "device",  # its kind is in the key
    "select",
    "check_ranks",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
)


def float_inputs(
    config: dict[str, Any],
    source: dict[str, Any],
    epochs: int,
    fingerprint: str,
    device: str,
    processes: int,
) -> dict[str, Any]:
    """Everything that the bits of a float model depend on.

    Args:
        config: The resolved configuration.
        source: The configuration of the network.
        epochs: Of float training.
        fingerprint: Of the data set.
        device: Where it is trained.
        processes: How many train it together.
    """
    here = environment(device)
    return {
        "seed": config["seed"],
        "pretrain": {
            **_without(config["pretrain"], "head", "checkpoint_key"),
            "checkpoint": None,
            "epochs": epochs,
        },
        "model": source,
        "scheduler": config["scheduler"],
        # Float training has a rate and a decay of its own, in the section pretrain.
        "optimizer": _without(config["optimizer"], "lr", "weight_decay"),
        "data": _without(config["data"], "root", "num_workers"),
        "fingerprint": fingerprint,
        "trainer": _without(config["trainer"], *NOT_FOR_FLOAT_TRAINING),
        "processes": processes,
        "hardware": here["hardware"],
        "cpu_threads": here["cpu_threads"] if here["hardware"].startswith("cpu") else None,
        "versions": _without(here["versions"], "python"),
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


def _without(node: dict[str, Any], *names: str) -> dict[str, Any]:
    """A configuration node without some of its settings."""
    return {key: value for key, value in node.items() if key not in names}
