"""Records of training: ``metrics.jsonl`` and trackers, which agree after a resume."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from adq_train.quantization.movement import MovementMeter
from adq_train.quantization.prepare import quantized_layers
from adq_train.reporting.loggers import Logger, started
from adq_train.run.folder import read_metrics
from adq_train.storage.files import write_text
from adq_train.training.hook import EpochReport, Hook
from adq_train.training.trainer import Trainer

# A curve per level is readable up to here; the 8-bit layers have 255 levels.
MOST_CURVES = 16
# How often weights and levels are drawn, over all of a stage.
PICTURES = 4


class Recorder(Hook):
    """Writes what a stage reports, after every epoch.

    Args:
        folder: The run's folder, or the shared one of a float model, for ``metrics.jsonl``.
        stage: ``pretrain`` or ``qat``.
        names: The trackers, of :data:`~.loggers.LOGGERS`.
        place: The run's folder, for the trackers; by default ``folder``.
        meter: Of the quantizers as they were calibrated; a float network has none.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        names: Sequence[str] = ("tensorboard",),
        place: Path | None = None,
        meter: MovementMeter | None = None,
    ) -> None:
        self.metrics = folder / "metrics.jsonl"
        self.stage, self.names, self.place = stage, names, place or folder
        self.loggers: list[Logger] | None = None
        self.meter = meter
        self.movement: dict[str, dict[str, float]] = {}

    def on_start(self, trainer: Trainer) -> None:
        """Drops what an interrupted run recorded after its last checkpoint, and goes on.

        Raises:
            UserError: A tracker does not start.
        """
        if not trainer.ranks.is_main:
            return
        done = trainer.epoch
        keep = [
            line
            for line in read_metrics(self.metrics)
            if line["stage"] != self.stage or line["epoch"] <= done
        ]
        self.movement = keep[-1].get("movement", {}) if keep else {}
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in keep))
        self.loggers = started(self.names, self.place, self.stage, keep, done)

    @contextmanager
    def context(self, trainer: Trainer) -> Iterator[None]:
        """Finishes the trackers in the end."""
        try:
            yield
        finally:
            for logger in self.loggers or ():
                logger.close()

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> None:
        """Records one epoch; codebooks and weights of a prepared network alone."""
        if self.loggers is None:
            return
        model, epochs = trainer.evaluated, trainer.settings.epochs
        layers = quantized_layers(model)
        levels = {name: layer.weight_quantizer.levels().tolist() for name, layer in layers.items()}
        codebooks = {name: found for name, found in levels.items() if len(found) <= MOST_CURVES}
        found = self.meter.measure(model, self.movement) if self.meter else {}
        self.movement = {name: asdict(x) for name, x in found.items()}
        quantizers = {"codebooks": codebooks, "movement": self.movement} if layers else {}
        record = {"stage": self.stage, **asdict(report), **quantizers}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        due = report.epoch % -(-epochs // PICTURES) == 0 or report.epoch == epochs
        for logger in self.loggers:
            logger.epoch(record)
            if layers and due:
                logger.pictures(model, report.epoch)
