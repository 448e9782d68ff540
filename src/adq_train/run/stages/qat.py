"""Stage qat: quantization-aware training."""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import nn

from adq_train.artifacts import BitAllocation
from adq_train.errors import UserError
from adq_train.quantization.movement import MovementMeter, report_movement
from adq_train.run.artifact_files import qat_key
from adq_train.run.folder import RunFolder
from adq_train.run.session import Session
from adq_train.run.stages.hooks import qat_hooks
from adq_train.states import load_state
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.evaluate import evaluate
from adq_train.training.trainer import Trainer

log = logging.getLogger(__name__)


def train_quantized(
    session: Session, folder: RunFolder, calibrated: nn.Module, allocation: BitAllocation
) -> nn.Module:
    """Trains a copy of a calibrated network; gives the model that ``trainer.select`` names.

    Raises:
        UserError: A loss or gradient is not finite, or the best checkpoint is damaged.
    """
    model, config, ranks = copy.deepcopy(calibrated), session.config, session.ranks
    key = qat_key(config.plain(), allocation, folder.origin)
    checkpoints = CheckpointFolder(folder.path / "checkpoints")
    if not config.trainer.epochs:
        if ranks.is_main:  # for adq-export and adq-eval
            checkpoints.save({"key": key, "epoch": 0, "model": model.state_dict()}, best=True)
        return model
    meter = MovementMeter(model)
    log.info("qat: %d epochs of %d steps", config.trainer.epochs, len(session.data.train))
    Trainer(
        model,
        session.optimizers(model),
        session.data,
        qat_hooks(session, folder, model, key, meter),
        settings=config.trainer,
        seed=config.seed,
        ranks=ranks,
    ).fit()
    if config.trainer.select == "best":
        best: dict[str, Any] | None = ranks.broadcast(
            lambda: checkpoints.load(key, names=("best",))
        )
        if best is None:
            raise UserError(f"{checkpoints.folder}/best.pt is missing or damaged")
        load_state(model, best["model"])
    report_movement(meter.measure(model))
    watched = evaluate(model, session.data.validation, ranks)
    log.info("qat: validation top-1 %.2f %%", watched.top1_percent)
    return model
