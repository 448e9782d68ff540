"""What a finished run left, read back: its settings, its data set and its trained network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from adq_train.artifacts import BitAllocation
from adq_train.data.base import ImageData, InputFormat
from adq_train.errors import UserError
from adq_train.export.architecture import build_network
from adq_train.export.datasets import load_data
from adq_train.quantization.prepare import prepare
from adq_train.run_folder import read_manifest, read_status
from adq_train.stages import qat_key
from adq_train.training.checkpoint import CheckpointFolder
from adq_train.validate import build, trust_problems, trusted_prefixes
from adq_train.weights import load_state


@dataclass(frozen=True)
class FinishedRun:
    """A run whose stages are all done.

    Attributes:
        path: Its folder.
        config: Its resolved configuration.
        manifest: Command, versions, seed, data fingerprint.
        allocation: Bits per layer.
    """

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    allocation: BitAllocation

    def input_format(self) -> InputFormat:
        """What the network expects; from the manifest, or for an older run from its data set."""
        known = self.manifest.get("input")
        return InputFormat.from_dict(known) if known else self.load_data().input_format

    def load_data(self) -> ImageData:
        """The run's data set, on the CPU."""
        batch_size = int(self.config["trainer"]["eval_batch_size"])
        return load_data(self.config["data"], batch_size, trusted_prefixes(self.config))


def open_run(path: Path) -> FinishedRun:
    """Reads the folder of a finished run.

    Raises:
        UserError: It is not one, it is not finished, or one of its files is damaged.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not the folder of a run (it has no config.yaml)")
    state = (read_status(path) or {}).get("state")
    if state != "done":
        raise UserError(
            f"the run in {path} is not finished (its state is {state}); continue it with the "
            "command in its manifest.json"
        )
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
        allocation = BitAllocation.from_json((path / "allocation.json").read_text("utf-8"))
        problems = list(trust_problems(config))
    except Exception as error:  # YAML, OmegaConf and a missing section have errors of their own
        raise UserError(f"the run in {path} is damaged ({error})") from error
    if problems:
        raise UserError(f"{path / 'config.yaml'}: {'; '.join(problems)}")
    return FinishedRun(path, config, read_manifest(path), allocation)


def trained_network(run: FinishedRun, name: str | None = None) -> nn.Module:
    """The trained, quantized network on the CPU, in evaluation mode.

    Args:
        run: The run.
        name: Of the checkpoint; None: the one that the run has tested.

    Raises:
        UserError: There is no intact checkpoint, or it does not fit the configuration.
    """
    config, expects = run.config, run.input_format()
    name = name or config["trainer"]["select"]
    checkpoints = CheckpointFolder(run.path / "checkpoints")
    state = checkpoints.load(qat_key(config, run.allocation), names=(name,))
    if state is None:
        raise UserError(
            f"{checkpoints.folder / name}.pt is missing, damaged or of another run; without it "
            "there is nothing to export"
        )
    trusted = trusted_prefixes(config)
    make_weight_quantizer, make_activation_quantizer = (
        build(config[group], group, lambda part: part, trusted)
        for group in ("weight_quantizer", "activation_quantizer")
    )
    network = build_network(config["model"], expects.num_classes, expects.image_shape[0], trusted)
    weights = state["model"]
    try:
        load_state(network, {key: weights[key] for key in network.state_dict()})
        # Quantizers get their shapes from calibration; the checkpoint then replaces the values.
        sample = torch.linspace(-1, 1, 1024)
        prepare(
            network,
            run.allocation,
            make_weight_quantizer,
            make_activation_quantizer,
            {layer.name: sample for layer in run.allocation.layers},
            seed=0,
        )
        load_state(network, weights)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{checkpoints.folder / name}.pt does not fit the configuration: {error}"
        ) from error
    return network.eval()
