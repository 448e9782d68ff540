"""What float training and QAT do besides their steps: the two lists of hooks."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from adq_train.reporting.recorder import Recorder
from adq_train.run.folder import RunFolder
from adq_train.run.session import Session
from adq_train.training.agreement import RanksAgree
from adq_train.training.average import WeightAverage
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.checkpointing import Checkpoints
from adq_train.training.health import FiniteWatch
from adq_train.training.hook import Hook
from adq_train.training.mixing import Mixing
from adq_train.training.reestimation import ReestimateBatchNorm
from adq_train.training.telling import TellProgress


def float_hooks(
    session: Session, folder: RunFolder, model: nn.Module, shared: Path, key: str, stage: str
) -> list[Hook]:
    """The hooks of float training.

    Args:
        session: The run's.
        folder: The run's.
        model: The network that is trained.
        shared: The folder of the float model, which keeps records and checkpoints.
        key: What the float model depends on.
        stage: ``pretrain`` or ``teacher``.
    """
    trainer = session.config.trainer
    return [
        *_before_records(session, model, stage),
        ReestimateBatchNorm(trainer.batch_norm_reestimation),
        # A float model is recorded as such: another run's teacher may be this one's model.
        Recorder(shared, "pretrain"),
        *_after_records(session, folder, shared, key, stage),
    ]


def qat_hooks(session: Session, folder: RunFolder, model: nn.Module, key: str) -> list[Hook]:
    """The hooks of QAT.

    Args:
        session: The run's.
        folder: The run's.
        model: Prepared and calibrated.
        key: What QAT depends on.
    """
    trainer = session.config.trainer
    return [
        *([session.teacher] if session.teacher else []),
        *_before_records(session, model, "qat"),
        ReestimateBatchNorm(trainer.batch_norm_reestimation, trainer.eval_batch_size),
        Recorder(folder.path, "qat"),
        *_after_records(session, folder, folder.path, key, "qat"),
    ]


def _before_records(session: Session, model: nn.Module, stage: str) -> list[Hook]:
    trainer = session.config.trainer
    alphas = {"mixup_alpha": trainer.mixup_alpha, "cutmix_alpha": trainer.cutmix_alpha}
    decay = trainer.weight_average_decay
    return [
        Mixing(session.data.num_classes, **alphas),
        FiniteWatch(stage, trainer.skip_nonfinite_steps),
        *([WeightAverage(model, decay)] if decay else []),
    ]


def _after_records(
    session: Session, folder: RunFolder, place: Path, key: str, stage: str
) -> list[Hook]:
    trainer = session.config.trainer

    def resumed(seconds: float) -> None:
        if seconds:  # that a killed process spent on steps that need not be done again
            folder.seconds[stage] = seconds

    checkpoints = Checkpoints(
        CheckpointFolder(place / "checkpoints"),
        key,
        stage,
        steps=trainer.checkpoint_every_steps,
        minutes=trainer.checkpoint_every_minutes,
        resumed=resumed,
    )
    return [*([RanksAgree()] if trainer.check_ranks else []), checkpoints, TellProgress(stage)]
