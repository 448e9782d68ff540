"""The end of a run: pictures, TensorBoard's last pages, and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from adq_train.artifacts import BitAllocation, LayerInfo, RunResult, SensitivityTable
from adq_train.errors import UserError
from adq_train.reporting import plots, summary
from adq_train.run.folder import RunFolder, read_metrics, read_values
from adq_train.run.manifest import read_manifest
from adq_train.storage.files import written_whole
from adq_train.storage.yaml_files import read_yaml


def num_float_values(model: nn.Module, layers: Sequence[LayerInfo]) -> int:
    """Parameters and float statistics of a float model outside the weights to be quantized."""
    values = (*model.parameters(), *model.buffers())  # each once, whatever its names
    floats: int = sum(x.numel() for x in values if x.is_floating_point())
    return floats - sum(layer.num_weights for layer in layers)


def write(
    folder: RunFolder,
    table: SensitivityTable,
    allocation: BitAllocation,
    result: RunResult,
    model: nn.Module,
) -> None:
    """Draws the pictures into ``plots/`` and TensorBoard, and writes the HParams session.

    Args:
        folder: The run's folder.
        table: Sensitivities.
        allocation: Bits.
        result: Figures on the test split.
        model: The model after QAT.
    """
    records = read_metrics(folder.path / "metrics.jsonl")
    figures = {
        "sensitivity": plots.sensitivity(table),
        "allocation": plots.allocation(allocation, table),
        "weights_and_levels": plots.weights_and_levels(model),
        "codebooks": plots.codebooks(records),
        "accuracy": plots.training(records, result),
        "summary": plots.summary(table, allocation, records, result, model),
    }
    (folder.path / "plots").mkdir(exist_ok=True)
    with SummaryWriter(str(folder.path / "tensorboard" / "result")) as writer:
        for name, figure in figures.items():
            path = folder.path / "plots" / f"{name}.png"
            with written_whole(path) as temporary:
                figure.savefig(temporary, format="png", dpi=110)
            # Drawing takes longer than anything else here, so TensorBoard gets the same pixels.
            with Image.open(path, formats=["PNG"]) as image:
                writer.add_image(name, np.asarray(image), dataformats="HWC")
        yaml = OmegaConf.to_yaml(folder.config)
        writer.add_text("config", "```yaml\n" + yaml + "```")
        metrics = {
            "result/fp_top1_percent": result.fp_top1_percent,
            "result/ptq_top1_percent": result.ptq_top1_percent,
            "result/qat_top1_percent": result.qat_top1_percent,
            "result/average_weight_bits": allocation.average_weight_bits,
            "result/model_size_bytes": float(allocation.model_size_bytes),
        }
        # The session's summaries alone: an experiment summary of each run would contradict the
        # others' in a sweep, and TensorBoard then shows those of the first.
        session: Any = hparams
        _, start, end = session(hyperparameters(folder.config), metrics)
        assert writer.file_writer is not None
        writer.file_writer.add_summary(start)
        writer.file_writer.add_summary(end)
        for name, value in metrics.items():
            writer.add_scalar(name, value)


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


def show(path: Path) -> None:
    """Prints the summary of a finished run.

    Args:
        path: The run's folder.

    Raises:
        UserError: An artifact is missing, damaged or another run's.
    """
    config: Any = read_yaml(path / "config.yaml")
    table, allocation, levels, result = read_values(path, config)
    manifest = read_manifest(path)
    if manifest.get("model") is None:
        raise UserError(f"{path / 'manifest.json'}: model is missing; delete the file and go on")
    model = manifest["model"]
    target = str((config.get("target") or {}).get("_target_"))
    counts = summary.Counts(model["num_float_values"], model.get("num_edges", 0), target)
    begun = "init_from" in (manifest.get("files") or {})
    summary.show(summary.render(table, allocation, levels, result, counts, path, begun))
