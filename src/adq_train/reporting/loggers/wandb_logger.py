"""Weights & Biases; ``WANDB_MODE=offline`` needs no network and no account."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from adq_train.errors import UserError
from adq_train.reporting.loggers import Logger, Outcome, Record, kept_id, plain, require, scalars

PROJECT = "adq-train"


class WandbLogger(Logger):
    """One W&B run per run's folder; ``WANDB_PROJECT`` and the rest of its variables count."""

    def __init__(self, folder: Path, stage: str, done: int, before: int) -> None:
        super().__init__(folder, stage, done, before)
        wandb = require("wandb")
        self.image = wandb.Image
        known = kept_id(folder, "wandb")
        self.is_new = known is None
        known = known or kept_id(folder, "wandb", secrets.token_hex(4))
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name[:128],
                id=known,
                resume="allow",
                dir=str(folder),
            )
        except Exception as error:  # of the network, or without an account
            raise UserError(
                f"logger: wandb does not start ({error}); WANDB_MODE=offline needs no network"
            ) from error

    def epoch(self, record: Record) -> None:
        """The figures of an epoch."""
        self.run.log(scalars(record), step=self.step(record["epoch"]))

    def outcome(self, outcome: Outcome) -> None:
        """The run's config and summary, and its pictures."""
        self.run.config.update(plain(outcome), allow_val_change=True)
        self.run.summary.update(dict(outcome.figures))
        self.run.log({name: self.image(str(x)) for name, x in outcome.pictures.items()})

    def close(self) -> None:
        """Sends the rest."""
        self.run.finish()
