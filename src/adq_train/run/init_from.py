"""QAT that begins where another run ended: ``init_from=RUN_FOLDER``, or one of its checkpoints."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adq_train.artifacts import BitAllocation
from adq_train.data.base import ImageData
from adq_train.deploy.trained import FinishedRun, open_run, restored_network
from adq_train.errors import UserError
from adq_train.quantization.base import Makers
from adq_train.quantization.edges import EDGES
from adq_train.quantization.layers import same_weight
from adq_train.quantization.prepare import collect_inputs, prepare
from adq_train.quantization.target import Target
from adq_train.run.artifact_files import float_key
from adq_train.run.manifest import differences
from adq_train.settings.schema import Config
from adq_train.states import load_state
from adq_train.storage.files import sha256
from adq_train.training.batch_norm import reestimate_batch_norm
from adq_train.training.checkpoint_folder import CheckpointFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where QAT begins.

    Attributes:
        source: The other run.
        file: Its checkpoint.
        network: The trained network of that checkpoint, on the CPU.
        float_state: The float model that it was made of; None where the run has kept none.
    """

    source: FinishedRun
    file: Path
    network: nn.Module
    float_state: dict[str, Tensor] | None


def checkpoint_of(init_from: str, trusted_packages: Sequence[str] = ()) -> tuple[FinishedRun, Path]:
    """The run that ``init_from`` names, and the checkpoint of it.

    Args:
        init_from: The folder of a finished run, or a file of its ``checkpoints``.
        trusted_packages: Of the run that begins; those of the other one do not count.

    Raises:
        UserError: It is neither, or the run is not finished or damaged.
    """
    path = Path(init_from)
    if not path.exists():
        raise UserError(f"init_from: there is no {path}; give the folder of a finished run")
    if path.is_file() and (path.parent.name != "checkpoints" or path.suffix != ".pt"):
        raise UserError(
            f"init_from: {path} is not in the checkpoints of a run; give the folder of a finished "
            "run, or pretrain.checkpoint for float weights"
        )
    try:
        run = open_run(path.parent.parent if path.is_file() else path, trusted_packages)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    folder = run.path / "checkpoints"
    file = path if path.is_file() else folder / f"{run.config.trainer.select}.pt"
    if not file.is_file():
        raise UserError(f"init_from: there is no {file}; the run in {run.path} is not whole")
    return run, file


def pinned(config: Config) -> Config:
    """With ``init_from_sha256`` of what the checkpoint holds: a part of the run's identity.

    Raises:
        UserError: There is no such checkpoint, or another digest was asked for.
    """
    asked = config.init_from_sha256
    if not config.init_from:
        if asked:
            raise UserError("init_from_sha256: it belongs to a checkpoint; give init_from too")
        return config
    _, file = checkpoint_of(config.init_from, config.trusted_packages)
    found = sha256(file)
    if asked not in (None, found):
        raise UserError(
            f"init_from_sha256: {file} has {found}, not {asked}; leave it out to take the file as "
            "it is"
        )
    return replace(config, init_from_sha256=found)


def open_start(config: Config, data: ImageData) -> Start | None:
    """What ``init_from`` names, read and checked; None where it names nothing.

    Args:
        config: Of the run that begins.
        data: Of that run.

    Raises:
        UserError: Checkpoint or float model are missing or damaged, or of another network.
    """
    if not config.init_from:
        return None
    source, file = checkpoint_of(config.init_from, config.trusted_packages)
    old, new = (
        {k: v for k, v in x.model.items() if k != "weights"} for x in (source.config, config)
    )
    known, given = (
        {"classes": x.num_classes, "channels": x.image_shape[0]}
        for x in (source.input_format(), data.input_format)
    )
    odd = [*differences(old, new, "model"), *differences(known, given, "data")]
    if odd:
        raise UserError(
            f"init_from: the run in {source.path} has another network ({'; '.join(odd[:3])}); "
            "choose the same model and as many classes"
        )
    kept = CheckpointFolder(source.path / "checkpoints").load(
        float_key(source.settings), names=("float",)
    )
    if kept is None and not config.pretrain.checkpoint:
        raise UserError(
            f"init_from: {source.path}/checkpoints/float.pt, its float model, is missing or "
            "damaged; give the float model as pretrain.checkpoint"
        )
    try:
        network = restored_network(source, file.stem)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    return Start(source, file, network, kept and kept["model"])


def continued(
    start: Start,
    config: Config,
    model: nn.Module,
    allocation: BitAllocation,
    images: Sequence[Tensor],
    make: Makers,
    target: Target,
) -> nn.Module:
    """A quantized network with the weights of another run, and its quantizers where they agree.

    A quantizer with other bits or settings is calibrated anew: on those weights, and on the
    inputs that its layer has in the other run's trained network. Batch norm's statistics are
    estimated anew where there is such a quantizer.

    Args:
        start: What the run begins with.
        config: Of the run that begins.
        model: Its float model.
        allocation: Its bits.
        images: Batches (N, …) to calibrate with.
        make: Map a bit-width to a quantizer of weights and of inputs.
        target: What will run it.
    """
    source = start.network.to(next(model.parameters()).device)
    if config.trainer.channels_last:
        source.to(memory_format=torch.channels_last)
    anew = dict(_calibrated_anew(config, start.source, model, allocation))
    log.info("init_from: weights and quantizers of %s", start.file)
    for quantizer, why in anew.items():
        log.info("init_from: %s is calibrated anew (%s)", quantizer, why)
    quantized, taken = copy.deepcopy(model), source.state_dict()
    load_state(quantized, {name: taken[name] for name in quantized.state_dict()})
    inputs = collect_inputs(source, [x.name for x in allocation.layers], images, config.seed)
    prepare(quantized, allocation, *make, inputs, config.seed)
    own = tuple(f"{quantizer}." for quantizer in anew)
    state = quantized.state_dict()
    load_state(quantized, {k: x if k.startswith(own) else taken[k] for k, x in state.items()})
    if anew:
        reestimate_batch_norm(quantized, images)
    target.connect(quantized)
    if start.source.target().name == target.name:
        state = quantized.state_dict()
        load_state(quantized, {k: taken[k] if k.startswith(EDGES) else x for k, x in state.items()})
    else:
        target.calibrate(quantized, images, config.seed)
    return quantized


def _calibrated_anew(
    config: Config, source: FinishedRun, model: nn.Module, allocation: BitAllocation
) -> Iterator[tuple[str, str]]:
    """The quantizers that are not those of the source, by name, and why."""
    before = source.allocation.bits()
    for bits in allocation.layers:
        old = before.get(bits.name)
        for kind, new_width, old_width in (
            ("weight", bits.weight_bits, old and old.weight_bits),
            ("activation", bits.activation_bits, old and old.activation_bits),
        ):
            group = f"{kind}_quantizer"
            odd = list(differences(getattr(source.config, group), getattr(config, group), group))
            why = f"{old_width} → {new_width} bits" if old_width != new_width else "; ".join(odd)
            if why:
                own = "weight" if kind == "weight" else "input"
                for name in same_weight(model, bits.name):
                    yield f"{name}.{own}_quantizer", why
