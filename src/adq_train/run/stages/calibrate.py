"""Stage prepare: the quantized network as QAT begins with it."""

from __future__ import annotations

import logging

from torch import nn

from adq_train.allocation.achieved import achieved, require_achieved
from adq_train.artifacts import BitAllocation
from adq_train.quantization.edges import edge_quantizers
from adq_train.run.init_from import continued
from adq_train.run.session import Session
from adq_train.training.calibration import calibrated
from adq_train.training.evaluate import evaluate

log = logging.getLogger(__name__)


def calibrate(session: Session, allocation: BitAllocation) -> nn.Module:
    """A quantized network of the allocated bits, initialised from the calibration images.

    It has the weights of the float model, or of the run that ``init_from`` names.

    Raises:
        UserError: Weights or inputs are NaN or infinite, or the bits do not come out as allocated.
    """
    parts, images = session.parts, [images for images, _ in session.calibration]
    make = parts.make_weight_quantizer, parts.make_activation_quantizer
    seed = session.config.seed
    if session.start:
        model = continued(
            session.start, session.config, session.model, allocation, images, make, parts.target
        )
    else:
        model = calibrated(session.model, allocation, make, images, seed, parts.target)
    session.ranks.broadcast_model(model)
    watched = evaluate(model, session.data.validation, session.ranks)
    stage = "init_from" if session.start else "calibrate"
    if edges := len(edge_quantizers(model)):
        log.info("target: %s, %d values at 8 bits besides inputs", parts.target.name, edges)
    log.info("%s: validation top-1 %.2f %%", stage, watched.top1_percent)
    require_achieved(allocation, achieved(model, images[0][:1], session.problem.pinned))
    return model
