"""Stages pretrain and teacher: a float network, trained once for all runs that begin with it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from adq_train.reporting.loggers import started
from adq_train.run.artifact_files import float_key
from adq_train.run.folder import RunFolder, read_metrics
from adq_train.run.session import Session
from adq_train.run.shared_model import SharedModel, float_inputs
from adq_train.run.stages.hooks import float_hooks
from adq_train.states import weights_digest
from adq_train.storage.files import sha256, write_text
from adq_train.storage.locks import exclusive
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.evaluate import evaluate
from adq_train.training.trainer import Trainer

log = logging.getLogger(__name__)


def pretrain(session: Session, folder: RunFolder) -> None:
    """Trains the float model, or takes the one that a run with the same float part has trained.

    Raises:
        UserError: The kept model is damaged.
    """
    config, model = session.config, session.model
    settings = config.pretrain
    given = config.init_from or (settings.checkpoint and settings.head == "keep")
    if given or not settings.epochs:
        log.info("pretrain: float weights as given")
        folder.goes_on_with("pretrain", session.data.fingerprint, weights_digest(model))
    else:
        checkpoint = Path(settings.checkpoint) if settings.checkpoint else None
        shared = train_float(
            session, folder, model, config.model, settings.epochs, "pretrain", checkpoint
        )
        if session.ranks.is_main:
            _tell_trackers(config.logger, shared, folder.path)
            _copy_metrics(shared, folder.path)
    if session.ranks.is_main:  # for the runs that begin where this one ends
        state = {"key": float_key(config.plain()), "model": model.state_dict()}
        CheckpointFolder(folder.path / "checkpoints").keep("float", state)


def train_teacher(session: Session, folder: RunFolder) -> None:
    """Trains the teacher of a distillation, or takes it as :func:`pretrain` takes a float model.

    Raises:
        UserError: The kept model is damaged.
    """
    teacher = session.teacher
    if teacher and teacher.epochs:
        source = session.config.distillation["model"]
        train_float(session, folder, teacher.model, source, teacher.epochs, "teacher")


def train_float(
    session: Session,
    folder: RunFolder,
    model: nn.Module,
    source: object,
    epochs: int,
    stage: str,
    checkpoint: Path | None = None,
) -> Path:
    """Float training in a folder that all runs share, unless that holds the trained model already.

    Args:
        session: The run's.
        folder: The run's.
        model: With its first weights; it has the trained ones afterwards.
        source: The configuration of the network.
        epochs: Of training.
        stage: Its name in the log and among the run's times.
        checkpoint: The file that the weights come from, where it is one.

    Returns:
        The shared folder.

    Raises:
        UserError: The kept model is damaged.
    """
    config, ranks = session.config, session.ranks
    network = replace(config, model=source, pretrain=replace(config.pretrain, epochs=epochs))
    inputs = float_inputs(
        network,
        session.data.fingerprint,
        str(session.parts.device),
        ranks.world_size,
        sha256(checkpoint) if checkpoint else None,
    )
    root = Path(config.output_root, "shared")
    noted = folder.float_model(stage)
    # One process looks whether the model of an earlier start is still there.
    found = ranks.broadcast(lambda: str(SharedModel(root, inputs, noted).folder))
    shared = SharedModel(root, inputs, Path(found).name)
    with exclusive(shared.folder) if ranks.is_main else contextlib.nullcontext():
        if not ranks.broadcast(shared.weights.exists):
            if ranks.is_main:
                shared.begin()
            log.info("%s: %d epochs of %d steps", stage, epochs, len(session.data.train))
            Trainer(
                model,
                session.optimizers(model, is_float=True),
                session.data,
                float_hooks(session, folder, model, shared.folder, shared.key, stage),
                settings=replace(config.trainer, epochs=epochs),
                seed=config.seed,
                ranks=ranks,
            ).fit()
            if ranks.is_main:
                shared.save(model)
        else:
            log.info("%s: float model from %s", stage, shared.folder)
        if ranks.is_main:
            shared.load(model)
    ranks.broadcast_model(model)
    watched = evaluate(model, session.data.validation, ranks)
    log.info("%s: validation top-1 %.2f %%", stage, watched.top1_percent)
    name = shared.folder.name
    folder.goes_on_with(stage, session.data.fingerprint, weights_digest(model), name)
    return shared.folder


def _tell_trackers(names: Sequence[str], source: Path, target: Path) -> None:
    """Gives a run's trackers the records of a float training that another run has made."""
    if any(x["stage"] == "pretrain" for x in read_metrics(target / "metrics.jsonl")):
        return
    records = read_metrics(source / "metrics.jsonl")
    for logger in started(names, target, "pretrain", records, len(records)):
        logger.close()


def _copy_metrics(source: Path, target: Path) -> None:
    """Gives a run the records of the float training that it shares."""
    own = [x for x in read_metrics(target / "metrics.jsonl") if x["stage"] != "pretrain"]
    records = [*read_metrics(source / "metrics.jsonl"), *own]
    write_text(target / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in records))
