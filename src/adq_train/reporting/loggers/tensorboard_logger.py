"""TensorBoard: losses and accuracies first, codebooks behind, float training and QAT in a line."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from adq_train.quantization.layer_weights import used_weight
from adq_train.quantization.prepare import quantized_layers
from adq_train.reporting import plots
from adq_train.reporting.loggers import Logger, Record, scalars


class TensorboardLogger(Logger):
    """Event files in ``tensorboard/<stage>``, each stage a run of its own colour."""

    def __init__(self, folder: Path, stage: str, done: int, before: int) -> None:
        super().__init__(folder, stage, done, before)
        place = folder / "tensorboard" / stage
        self.is_new = not place.exists()
        purge = 0 if self.is_new else self.step(done + 1)
        self.writer = SummaryWriter(str(place), purge_step=purge)

    def epoch(self, record: Record) -> None:
        """Curves of an epoch, and of each level of the codebooks."""
        step, codebooks = self.step(record["epoch"]), record.get("codebooks") or {}
        for tag, value in scalars(record).items():
            self.writer.add_scalar(tag, value, step)
        for name, levels in codebooks.items():
            for index, level in enumerate(levels):
                self.writer.add_scalar(f"6_codebook/{name}/{index}", level, step)
        if codebooks and record["epoch"] == 1:
            # One chart per layer on the Custom Scalars page, instead of one per level.
            charts = {x: ["Multiline", [f"6_codebook/{re.escape(x)}/.*"]] for x in codebooks}
            self.writer.add_custom_scalars({"codebooks": charts})
        self.writer.flush()

    def pictures(self, model: nn.Module, epoch: int) -> None:
        """Histograms of the weights, and their levels on top."""
        step = self.step(epoch)
        for name, layer in quantized_layers(model).items():
            self.writer.add_histogram(f"7_weights/{name}", used_weight(layer), step)
        self.writer.add_figure("weights_and_levels", plots.weights_and_levels(model), step)
        self.writer.flush()

    def close(self) -> None:
        """Finishes the event file."""
        self.writer.close()
