"""Records of training: ``metrics.jsonl`` and TensorBoard, which agree after a resume."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from adq_train.quantization.layer_weights import used_weight
from adq_train.quantization.movement import MovementMeter
from adq_train.quantization.prepare import quantized_layers
from adq_train.reporting import plots
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
        folder: The run's folder (or the shared one of a float model).
        stage: ``pretrain`` or ``qat``; TensorBoard shows each as a run of its own.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self.metrics = folder / "metrics.jsonl"
        self.stage = stage
        self.tensorboard = folder / "tensorboard" / stage
        self.writer: SummaryWriter | None = None
        self.meter: MovementMeter | None = None
        self.movement: dict[str, dict[str, float]] = {}

    def restore(self, trainer: Trainer) -> None:
        """Looks at the quantizers as they were calibrated, to see how far training moves them."""
        self.meter = MovementMeter(trainer.model)

    def on_start(self, trainer: Trainer) -> None:
        """Drops what an interrupted run recorded after its last checkpoint, and goes on."""
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
        self.writer = SummaryWriter(str(self.tensorboard), purge_step=done + 1)

    @contextmanager
    def context(self, trainer: Trainer) -> Iterator[None]:
        """Finishes the event file in the end."""
        try:
            yield
        finally:
            if self.writer is not None:
                self.writer.close()

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> None:
        """Records one epoch; codebooks and weights of a prepared network alone."""
        if self.writer is None:
            return
        assert self.meter is not None
        model, epochs = trainer.evaluated, trainer.settings.epochs
        values = asdict(report)
        layers = quantized_layers(model)
        levels = {name: layer.weight_quantizer.levels().tolist() for name, layer in layers.items()}
        codebooks = {name: found for name, found in levels.items() if len(found) <= MOST_CURVES}
        found = self.meter.measure(model, self.movement)
        self.movement = {name: asdict(x) for name, x in found.items()}
        quantizers = {"codebooks": codebooks, "movement": self.movement} if layers else {}
        record = {"stage": self.stage, **values, **quantizers}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for tag, name in (
            ("loss/train", "train_loss"),
            ("loss/validation", "validation_loss"),
            ("accuracy/validation_top1_percent", "validation_top1_percent"),
            ("learning_rate", "lr"),
            ("speed/images_per_second", "images_per_second"),
            ("speed/data_wait_percent", "data_wait_percent"),
            ("speed/peak_memory_bytes", "peak_memory_bytes"),
        ):
            self.writer.add_scalar(tag, values[name], report.epoch)
        for name, figures in self.movement.items():
            for figure, value in figures.items():
                self.writer.add_scalar(f"movement_{figure}/{name}", value, report.epoch)
        for name, values_of in codebooks.items():
            for index, level in enumerate(values_of):
                self.writer.add_scalar(f"codebook/{name}/{index}", level, report.epoch)
        if codebooks and report.epoch == 1:
            # One chart per layer on the Custom Scalars page, instead of one per level.
            charts = {x: ["Multiline", [f"codebook/{re.escape(x)}/.*"]] for x in codebooks}
            self.writer.add_custom_scalars({"codebooks": charts})
        due = report.epoch % -(-epochs // PICTURES) == 0 or report.epoch == epochs
        if layers and due:
            for name, layer in layers.items():
                self.writer.add_histogram(f"weights/{name}", used_weight(layer), report.epoch)
            self.writer.add_figure(
                "weights_and_levels", plots.weights_and_levels(model), report.epoch
            )
        self.writer.flush()
