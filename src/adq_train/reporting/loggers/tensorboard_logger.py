"""TensorBoard: losses and accuracies first, codebooks behind, float training and QAT in a line."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from adq_train.quantization.layer_weights import used_weight
from adq_train.quantization.prepare import quantized_layers
from adq_train.reporting import plots
from adq_train.reporting.loggers import Logger, Outcome, Record, scalars


class TensorboardLogger(Logger):
    """Event files in ``tensorboard/<stage>``, each stage a run of its own colour."""

    def __init__(self, folder: Path, stage: str, done: int, before: int) -> None:
        super().__init__(folder, stage, done, before)
        self.place = folder / "tensorboard" / stage
        self.is_new = not self.place.exists()

    @cached_property
    def writer(self) -> SummaryWriter:
        """Of the stage; what came after the epochs that are done is void."""
        purge = 0 if self.is_new else self.step(self.done + 1)
        return SummaryWriter(str(self.place), purge_step=purge)

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

    def outcome(self, outcome: Outcome) -> None:
        """The pictures, the configuration, and a session on the HParams page."""
        with SummaryWriter(str(self.folder / "tensorboard" / "result")) as writer:
            for name, path in outcome.pictures.items():
                with Image.open(path, formats=["PNG"]) as image:
                    writer.add_image(name, np.asarray(image), dataformats="HWC")
            yaml = OmegaConf.to_yaml(outcome.settings)
            writer.add_text("config", "```yaml\n" + yaml + "```")
            # The session's summaries alone: an experiment summary of each run would contradict the
            # others' in a sweep, and TensorBoard then shows those of the first.
            session: Any = hparams
            _, start, end = session(hyperparameters(dict(outcome.settings)), dict(outcome.figures))
            assert writer.file_writer is not None
            writer.file_writer.add_summary(start)
            writer.file_writer.add_summary(end)
            for name, value in outcome.figures.items():
                writer.add_scalar(name, value)

    def close(self) -> None:
        """Finishes the event file."""
        if "writer" in vars(self):
            self.writer.close()


def hyperparameters(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """The settings that tell runs of a sweep apart, for TensorBoard's HParams page."""

    def short(node: dict[str, Any]) -> str:
        return str(node["_target_"]).rsplit(".", 1)[-1]

    weights, activations = config["weight_quantizer"], config["activation_quantizer"]
    values: dict[str, Any] = {
        "seed": config["seed"],
        "data": short(config["data"]),
        "model": short(config["model"]),
        "weights": short(weights),
        "activations": short(activations),
        "allocator": short(config["allocator"]),
        "candidates": str(config["bits"]["candidates"]),
        "epochs": config["trainer"]["epochs"],
        "lr": config["optimizer"]["lr"],
        **{name: weights[name] for name in ("initialization", "adaptation") if name in weights},
        **{f"budget/{k}": v for k, v in config["budget"].items() if v is not None},
    }
    return values
