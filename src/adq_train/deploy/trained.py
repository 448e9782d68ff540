"""What a finished run left, read back: its settings, its data set, its network and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from adq_train.artifacts import BitAllocation
from adq_train.data.base import ImageData, InputFormat
from adq_train.deploy.architecture import build_network, limited_to
from adq_train.deploy.datasets import data_section, load_data
from adq_train.deploy.model import TableModel, tables_of_network
from adq_train.errors import UserError
from adq_train.quantization.prepare import keep_weights
from adq_train.quantization.restore import restored
from adq_train.quantization.target import FLOAT, Target
from adq_train.run.artifact_files import qat_key, read_bits
from adq_train.run.folder import origin_of, read_status
from adq_train.run.manifest import read_manifest
from adq_train.settings.building import build
from adq_train.settings.schema import Config
from adq_train.settings.targets import trust_problems, trusted_prefixes
from adq_train.storage.yaml_files import read_yaml
from adq_train.training.checkpoint_folder import CheckpointFolder


@dataclass(frozen=True)
class FinishedRun:
    """A run whose stages are all done.

    Attributes:
        path: Its folder.
        config: Its configuration.
        settings: The same as it is kept, by the version that made the run.
        manifest: Command, versions, seed, data fingerprint.
        allocation: Bits per layer.
        trusted: Where its parts may be defined.
    """

    path: Path
    config: Config
    settings: dict[str, Any]
    manifest: dict[str, Any]
    allocation: BitAllocation
    trusted: tuple[str, ...]

    def input_format(self) -> InputFormat:
        """What the network expects; from the manifest, or for an older run from its data set."""
        known = self.manifest.get("input")
        return InputFormat.from_dict(known) if known else self.load_data().input_format

    def target(self) -> Target:
        """What the network was made for.

        Raises:
            ConfigError: The configuration names something else.
        """
        node = self.config.target
        target: Target = build(node, "target", lambda part: part, self.trusted) if node else FLOAT
        return target

    def load_data(self, changes: Mapping[str, str] | None = None) -> ImageData:
        """The run's data set, on the CPU.

        Args:
            changes: Settings of it to change, by name, in YAML.
        """
        section, download = data_section(self.config.data, None, changes or {})
        together = self.config.trainer.eval_batch_size
        return load_data(section, together, self.trusted, download)


def open_run(path: Path, trusted_packages: Sequence[str] = ()) -> FinishedRun:
    """Reads the folder of a finished run.

    Args:
        path: The folder.
        trusted_packages: Whose classes it may name, besides the built-in ones. What its own
            config.yaml says about that does not count: it may come from anybody.

    Raises:
        UserError: It is not one, it is not finished, or one of its files is damaged.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not the folder of a run (it has no config.yaml)")
    state = (read_status(path) or {}).get("state")
    if state != "done":
        raise UserError(
            f"the run in {path} is not finished (its state is {state}); wait if it is still going "
            "on, or continue it with the command in its manifest.json"
        )
    try:
        settings: Any = read_yaml(path / "config.yaml")
        settings["trusted_packages"] = list(trusted_packages)
        problems = list(trust_problems(settings))
        config = Config.of(settings)
        if config.trainer.select not in ("last", "best"):
            problems.append(f"trainer.select: must be last or best, got {config.trainer.select!r}")
    except Exception as error:  # a section that is missing, or something else
        raise UserError(f"the run in {path} is damaged ({error})") from error
    if problems:
        raise UserError(f"{path / 'config.yaml'}: {'; '.join(problems)}")
    _, allocation = read_bits(path, settings, origin_of(path, settings))
    trusted = trusted_prefixes(trusted_packages)
    return FinishedRun(path, config, settings, read_manifest(path), allocation, trusted)


def trained_network(run: FinishedRun) -> nn.Module:
    """The network that the run has tested, on the CPU, every weight a parameter.

    Raises:
        UserError: There is no intact checkpoint, or it does not fit the configuration.
    """
    network = restored_network(run)
    keep_weights(network)
    return network.eval()


def restored_network(run: FinishedRun, name: str | None = None) -> nn.Module:
    """The trained, quantized network as QAT left it, on the CPU, in evaluation mode.

    Args:
        run: The run.
        name: Of the checkpoint; None: the one that the run has tested.

    Raises:
        UserError: There is no intact checkpoint, or it does not fit the configuration.
    """
    config, expects = run.config, run.input_format()
    name = name or config.trainer.select
    checkpoints = CheckpointFolder(run.path / "checkpoints")
    state = checkpoints.load(
        qat_key(run.settings, run.allocation, origin_of(run.path, run.settings)), names=(name,)
    )
    if state is None:
        raise UserError(
            f"{checkpoints.folder / name}.pt is missing, damaged or of another run; without it "
            "there is nothing to export"
        )
    make = [
        build(getattr(config, group), group, lambda part: part, run.trusted)
        for group in ("weight_quantizer", "activation_quantizer")
    ]
    target = run.target()
    weights = state["model"]
    with limited_to(len(weights), sum(x.numel() for x in weights.values())):
        network = build_network(
            config.model, expects.num_classes, expects.image_shape[0], run.trusted
        )
    try:
        makers = target.makers((make[0], make[1]))
        restored(network, run.allocation, makers, weights, target)
    except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoints.folder / name}.pt does not fit the configuration: {error}"
        ) from error
    return network.eval()


def table_model(run: FinishedRun, network: nn.Module | None = None) -> TableModel:
    """The trained network of a run as tables.

    Args:
        run: The run.
        network: Its trained network, where that has been read already.

    Raises:
        UserError: There is no checkpoint, or a quantizer cannot be put in tables.
    """
    facts = {key: run.manifest.get(key) for key in ("command", "seed", "git", "versions", "data")}
    return replace(
        tables_of_network(network or trained_network(run)),
        model=run.config.model,
        data=run.config.data,
        expects=run.input_format(),
        run={
            **facts,
            "average_weight_bits": run.allocation.average_weight_bits,
            "model_size_bytes": run.allocation.model_size_bytes,
        },
    )
