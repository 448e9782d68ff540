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
from torch.optim import Optimizer

from adq_train.data.base import Batches, ImageData
from adq_train.errors import UserError
from adq_train.quantization.base import Quantizer
from adq_train.reporting.progress import Progress
from adq_train.training.batch_norm import first_images, reestimate_batch_norm
from adq_train.training.checkpoint import CheckpointFolder
from adq_train.training.evaluate import evaluate
from adq_train.training.schedule import Schedule
from adq_train.training.step import TrainingStep
from adq_train.training.throughput import TimedBatches, duration

log = logging.getLogger(__name__)

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], Optimizer]


@dataclass(frozen=True)
class EpochReport:
    """What one epoch gave; ``epoch`` counts from 1, ``lr`` is the last step's base rate.

    The last three figures are of its training, without evaluation.
    """

    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    validation_top1_percent: float
    lr: float
    seconds: float
    images_per_second: float
    data_wait_percent: float
    peak_memory_bytes: int


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
    step: TrainingStep, batches: Batches, epoch: int, lr_factor: Callable[[int], float]
) -> float:
    """One pass over the training images.

    Args:
        step: What happens with each batch; its optimizer's groups keep their base rate in
            ``initial_lr``.
        batches: The training images.
        epoch: From 0.
        lr_factor: Maps the number of finished steps to the factor on the base rates.

    Returns:
        The mean training loss.
    """
    step.model.train()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for done, (images, targets) in enumerate(batches.epoch(epoch), epoch * len(batches)):
        for group in step.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(done)
        loss = step(images, targets, done)
        total = total.to(loss.device) + loss.double() * len(targets)
        count += len(targets)
    step.finish_epoch()
    return float(total) / count


def fit(
    step: TrainingStep,
    data: ImageData,
    schedule: Schedule,
    *,
    epochs: int,
    stage: str,
    checkpoints: CheckpointFolder,
    key: str,
    on_start: Callable[[int, float], None],
    on_epoch: Callable[[EpochReport, nn.Module], None],
    batch_norm_images: int = 0,
) -> None:
    """Trains to the last epoch, from the newest checkpoint where there is one.

    Order, augmentation and learning rate are functions of the epoch and the step, so a run that
    was interrupted ends with the same weights as one that was not.

    Args:
        step: What happens with each batch; its model is trained in place.
        data: Trains on ``train``, watches ``validation``.
        schedule: Maps progress in [0, 1) to a factor on the learning rates.
        epochs: How many in all.
        stage: Shown in the progress.
        checkpoints: One checkpoint after every epoch.
        key: Everything that the outcome depends on; other checkpoints are not used.
        on_start: Called with the epochs that are done already and the seconds that they took.
        on_epoch: Called after every epoch, before its checkpoint, with the evaluated model.
        batch_norm_images: So many training images, at least, give batch norm's statistics anew
            before each evaluation; 0 keeps those of training.

    Raises:
        UserError: A loss or gradient is not finite; the last good checkpoint is kept.
    """
    optimizer = step.optimizer
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    done, best, seconds = 0, -math.inf, 0.0
    state = checkpoints.load(key)
    if state is not None:
        step.evaluated.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step.load_state_dict(state["step"])
        _set_rng_states(state["rng"])
        done, best, seconds = state["epoch"], state["best_top1_percent"], state["seconds"]
        log.info("%s: continuing after epoch %d of %d", stage, done, epochs)
    on_start(done, seconds)

    total_steps = epochs * len(data.train)
    with Progress(stage, total=epochs, done=done) as progress:
        for epoch in range(done, epochs):
            began = time.perf_counter()
            train = TimedBatches(data.train)
            train_loss = train_epoch(step, train, epoch, lambda done: schedule(done / total_steps))
            speed = train.throughput(time.perf_counter() - began)
            if batch_norm_images:
                images = first_images(data.train, epoch, batch_norm_images)
                reestimate_batch_norm(step.evaluated, images)
            watched = evaluate(step.evaluated, data.validation)
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
                **vars(speed),
            )
            on_epoch(report, step.evaluated)
            is_best = watched.top1_percent > best
            best = max(best, watched.top1_percent)
            checkpoints.save(
                {
                    "key": key,
                    "epoch": epoch + 1,
                    "best_top1_percent": best,
                    "seconds": seconds,
                    "rng": _rng_states(),
                    "model": step.evaluated.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step.state_dict(),
                },
                best=is_best,
            )
            left = seconds / (epoch + 1) * (epochs - epoch - 1)
            progress.advance(
                f"loss {train_loss:.3f}, validation {watched.top1_percent:.1f} %, "
                f"{speed.images_per_second:.0f} images/s, {speed.data_wait_percent:.0f} % of it "
                f"waiting for data, peak {speed.peak_memory_bytes / 1e6:.0f} MB, "
                f"{duration(left)} left"
            )
    step.finish()


def _rng_states() -> list[torch.Tensor]:
    """The states of the CPU's and every GPU's generator, which dropout draws from."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def _set_rng_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) == 1 + torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[1:])
