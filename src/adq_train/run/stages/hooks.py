"""What float training and QAT do besides their steps: the two lists of hooks."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from adq_train.quantization.movement import MovementMeter
from adq_train.reporting.recorder import Recorder
from adq_train.run.folder import RunFolder
from adq_train.run.session import Session
from adq_train.training.agreement import RanksAgree
from adq_train.training.average import WeightAverage
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.checkpointing import Checkpoints
from adq_train.training.damping import Damping
from adq_train.training.health import FiniteWatch
from adq_train.training.hook import Hook
from adq_train.training.mixing import Mixing
from adq_train.training.progress_bar import ProgressBar
from adq_train.training.reestimation import ReestimateBatchNorm

QAT = "qat"


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
    names = session.config.logger if stage == "pretrain" else ()
    return [
        *training_hooks(session, model, stage),
        # A float model is recorded as such: another run's teacher may be this one's model.
        Recorder(shared, "pretrain", names, folder.path),
        *_keeping_hooks(session, folder, shared, key, stage),
    ]


def qat_hooks(
    session: Session, folder: RunFolder, model: nn.Module, key: str, meter: MovementMeter
) -> list[Hook]:
    """The hooks of QAT.

    Args:
        session: The run's.
        folder: The run's.
        model: Prepared and calibrated.
        key: What QAT depends on.
        meter: Of the quantizers as they were calibrated.
    """
    return [
        *training_hooks(session, model, QAT),
        Recorder(folder.path, QAT, session.config.logger, meter=meter),
        *_keeping_hooks(session, folder, folder.path, key, QAT),
    ]


def training_hooks(session: Session, model: nn.Module, stage: str) -> list[Hook]:
    """What belongs to the training itself: all that decides what comes out of it.

    Args:
        session: The run's.
        model: The network that is trained.
        stage: ``qat``, or one of float training.
    """
    trainer, qat = session.config.trainer, stage == QAT
    alphas = {"mixup_alpha": trainer.mixup_alpha, "cutmix_alpha": trainer.cutmix_alpha}
    decay, damping = trainer.weight_average_decay, trainer.oscillation_damping
    return [
        *([session.teacher] if session.teacher and qat else []),
        Mixing(session.data.num_classes, **alphas),
        *([Damping(model, damping)] if damping and qat else []),
        FiniteWatch(stage, trainer.skip_nonfinite_steps),
        *([WeightAverage(model, decay)] if decay else []),
        ReestimateBatchNorm(trainer.batch_norm_reestimation, trainer.eval_batch_size if qat else 1),
    ]


def _keeping_hooks(
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
    return [*([RanksAgree()] if trainer.check_ranks else []), checkpoints, ProgressBar(stage)]
