"""The training loop, for float models and for quantized ones."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from adq_train.data.base import Batches, ImageData
from adq_train.errors import UserError
from adq_train.quantization.base import Quantizer
from adq_train.quantization.prepare import Upkeep
from adq_train.reporting.progress import Progress
from adq_train.training.checkpoint import CheckpointFolder
from adq_train.training.evaluate import evaluate
from adq_train.training.schedule import Schedule

log = logging.getLogger(__name__)

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], Optimizer]


@dataclass(frozen=True)
class EpochReport:
    """What one epoch gave; ``epoch`` counts from 1, ``lr`` is the last step's base rate."""

    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    validation_top1_percent: float
    lr: float
    seconds: float


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, quantizer_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Three optimizer groups: weights, norms and biases, quantizer parameters.

    Only weights decay: the others set scales and offsets, which zero would not regularise.

    Args:
        model: Its parameters that require gradients are grouped.
        lr: Learning rate of the first two groups.
        weight_decay: Of the first group.
        quantizer_lr_factor: The third group's learning rate, as a multiple of ``lr``.
    """
    of_quantizers = {
        id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in of_quantizers]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        {
            "params": [p for p in trained if id(p) in of_quantizers],
            "lr": lr * quantizer_lr_factor,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def train_epoch(
    model: nn.Module,
    batches: Batches,
    epoch: int,
    optimizer: Optimizer,
    lr_factor: Callable[[int], float],
    *,
    label_smoothing: float = 0.0,
    gradient_clip_norm: float | None = None,
) -> float:
    """One pass over the training images.

    Args:
        model: Float or prepared; codebooks adapt after each optimizer step.
        batches: The training images.
        epoch: From 0.
        optimizer: Its groups keep their base rate in ``initial_lr``.
        lr_factor: Maps the number of finished steps to the factor on the base rates.
        label_smoothing: Share of the target's probability spread over all classes.
        gradient_clip_norm: Largest L2 norm of the gradients, or None.

    Returns:
        The mean training loss.
    """
    model.train()
    upkeep = Upkeep(model)
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for step, (images, targets) in enumerate(batches.epoch(epoch), epoch * len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(step)
        loss = F.cross_entropy(model(images), targets, label_smoothing=label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        upkeep.before_step()
        if gradient_clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), gradient_clip_norm)
        optimizer.step()
        upkeep.after_step(step + 1)
        total = total.to(loss.device) + loss.detach().double() * len(targets)
        count += len(targets)
    return float(total) / count


def fit(
    model: nn.Module,
    data: ImageData,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    epochs: int,
    stage: str,
    checkpoints: CheckpointFolder,
    key: str,
    on_start: Callable[[int, float], None],
    on_epoch: Callable[[EpochReport, nn.Module], None],
    label_smoothing: float = 0.0,
    gradient_clip_norm: float | None = None,
) -> None:
    """Trains to the last epoch, from the newest checkpoint where there is one.

    Order, augmentation and learning rate are functions of the epoch and the step, so a run that
    was interrupted ends with the same weights as one that was not.

    Args:
        model: Trained in place.
        data: Trains on ``train``, watches ``validation``.
        optimizer: Over the model's parameters.
        schedule: Maps progress in [0, 1) to a factor on the learning rates.
        epochs: How many in all.
        stage: Shown in the progress.
        checkpoints: One checkpoint after every epoch.
        key: Everything that the outcome depends on; other checkpoints are not used.
        on_start: Called with the epochs that are done already and the seconds that they took.
        on_epoch: Called after every epoch, before its checkpoint.
        label_smoothing: See :func:`train_epoch`.
        gradient_clip_norm: See :func:`train_epoch`.

    Raises:
        UserError: The loss is no longer finite; the last good checkpoint is kept.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    done, best, seconds = 0, -math.inf, 0.0
    state = checkpoints.load(key)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        _set_rng_states(state["rng"])
        done, best, seconds = state["epoch"], state["best_top1_percent"], state["seconds"]
        log.info("%s: continuing after epoch %d of %d", stage, done, epochs)
    on_start(done, seconds)

    total_steps = epochs * len(data.train)
    with Progress(stage, total=epochs, done=done) as progress:
        for epoch in range(done, epochs):
            began = time.perf_counter()
            train_loss = train_epoch(
                model,
                data.train,
                epoch,
                optimizer,
                lambda step: schedule(step / total_steps),
                label_smoothing=label_smoothing,
                gradient_clip_norm=gradient_clip_norm,
            )
            watched = evaluate(model, data.validation)
            for what, loss in (("training", train_loss), ("validation", watched.loss)):
                if not math.isfinite(loss):
                    raise UserError(
                        f"{stage}: the {what} loss is {loss} in epoch {epoch + 1}; the last good "
                        "checkpoint is kept; try a lower learning rate or "
                        "trainer.gradient_clip_norm=1"
                    )
            seconds += time.perf_counter() - began
            report = EpochReport(
                epoch=epoch + 1,
                step=(epoch + 1) * len(data.train),
                train_loss=train_loss,
                validation_loss=watched.loss,
                validation_top1_percent=watched.top1_percent,
                lr=optimizer.param_groups[0]["lr"],
                seconds=seconds,
            )
            on_epoch(report, model)
            is_best = watched.top1_percent > best
            best = max(best, watched.top1_percent)
            checkpoints.save(
                {
                    "key": key,
                    "epoch": epoch + 1,
                    "best_top1_percent": best,
                    "seconds": seconds,
                    "rng": _rng_states(),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                best=is_best,
            )
            progress.advance(f"loss {train_loss:.3f}, validation {watched.top1_percent:.1f} %")


def _rng_states() -> list[torch.Tensor]:
    """The states of the CPU's and every GPU's generator, which dropout draws from."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def _set_rng_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) == 1 + torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[1:])
