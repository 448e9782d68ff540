"""The end of a run: pictures, the trackers' last page, and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adq_train.artifacts import BitAllocation, LayerInfo, RunResult, SensitivityTable
from adq_train.errors import UserError
from adq_train.reporting import plots, summary
from adq_train.reporting.loggers import Outcome, started
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
    trackers: Sequence[str],
) -> None:
    """Draws the pictures into ``plots/``, and gives trackers what the run was and came to.

    Args:
        folder: The run's folder.
        table: Sensitivities.
        allocation: Bits.
        result: Figures on the test split.
        model: The model after QAT.
        trackers: Of :data:`~.loggers.LOGGERS`.
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
    pictures = {name: folder.path / "plots" / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        with written_whole(pictures[name]) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    final = {
        "result/fp_top1_percent": result.fp_top1_percent,
        "result/ptq_top1_percent": result.ptq_top1_percent,
        "result/qat_top1_percent": result.qat_top1_percent,
        "result/average_weight_bits": allocation.average_weight_bits,
        "result/model_size_bytes": float(allocation.model_size_bytes),
    }
    done = max((x["epoch"] for x in records if x["stage"] == "qat"), default=0)
    for logger in started(trackers, folder.path, "qat", records, done):
        logger.outcome(Outcome(folder.config, final, pictures))
        logger.close()


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
    # A run from before it was written down had no other target than int8.
    edges = model.get("num_edges", 0), model.get("target", "int8")
    counts = summary.Counts(model["num_float_values"], *edges)
    begun = "init_from" in (manifest.get("files") or {})
    trusted = tuple(map(str, config.get("trusted_packages") or ()))
    summary.show(summary.render(table, allocation, levels, result, counts, path, begun, trusted))
