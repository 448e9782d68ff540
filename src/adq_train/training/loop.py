"""The training loop, for float models and for quantized ones."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from adq_train.data.base import Batches, ImageData, derived_seed
from adq_train.errors import UserError
from adq_train.interrupts import Interrupted, held
from adq_train.reporting.progress import Progress
from adq_train.sensitivity.partial import weights_digest
from adq_train.states import load_state
from adq_train.training.batch_norm import first_images, reestimate_batch_norm
from adq_train.training.checkpoint_folder import CheckpointFolder, Rhythm
from adq_train.training.distributed import Ranks
from adq_train.training.evaluate import evaluate
from adq_train.training.schedule import Schedule
from adq_train.training.step import TrainingStep
from adq_train.training.throughput import TimedBatches, duration

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Sums:
    """What an epoch has added up so far.

    Attributes:
        batches: Finished batches.
        images: In them, over all processes.
        loss: Sum of the images' losses, () float64.
    """

    batches: int = 0
    images: int = 0
    loss: torch.Tensor = torch.zeros((), dtype=torch.float64)


def train_epoch(
    step: TrainingStep,
    batches: Batches,
    epoch: int,
    lr_factor: Callable[[int], float],
    *,
    seed: int = 0,
    sums: Sums = Sums(),
    after_step: Callable[[Sums], None] = lambda sums: None,
) -> float:
    """One pass over the training images, or the rest of one.

    What is drawn at random in a step (dropout) is a function of the seed, the step and the
    process, so that it needs no place in a checkpoint.

    Args:
        step: What happens with each batch; its optimizer's groups keep their base rate in
            ``initial_lr``.
        batches: The training images.
        epoch: From 0.
        lr_factor: Maps the number of finished steps to the factor on the base rates.
        seed: For what is drawn at random.
        sums: Of the batches that are done already.
        after_step: Called after every step.

    Returns:
        The mean training loss.
    """
    step.model.train()
    ranks, first = step.ranks, epoch * len(batches)
    rest = batches.epoch(epoch, slice(sums.batches, None), ranks.own)
    for index, (images, targets) in enumerate(rest, sums.batches):
        done = first + index
        for group in step.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(done)
        _seed_generators(derived_seed(seed, "step", done, ranks.rank), images.device)
        loss = step(images, targets, done)
        size = batches.size(index)
        total = sums.loss.to(loss.device) + loss.double() * size
        sums = Sums(index + 1, sums.images + size, total)
        after_step(sums)
    step.finish_epoch()
    return float(sums.loss) / sums.images


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
    batch_norm_together: int = 1,
    seed: int = 0,
    rhythm: Rhythm | None = None,
    check_ranks: bool = False,
) -> None:
    """Trains to the last epoch, from the newest checkpoint where there is one.

    Order, augmentation, dropout and learning rate are functions of the seed, the epoch and the
    step, so a run that was interrupted ends with the same weights as one that was not.

    Args:
        step: What happens with each batch; its model is trained in place.
        data: Trains on ``train``, watches ``validation``.
        schedule: Maps progress in [0, 1) to a factor on the learning rates.
        epochs: How many in all.
        stage: Shown in the progress.
        checkpoints: One checkpoint after every epoch, and where ``rhythm`` says so.
        key: Everything that the outcome depends on; other checkpoints are not used.
        on_start: Called with the epochs that are done already and the seconds that they took.
        on_epoch: Called after every epoch, before its checkpoint, with the evaluated model; in
            the process that writes.
        batch_norm_images: So many training images, at least, give batch norm's statistics anew
            before each evaluation; 0 keeps those of training.
        batch_norm_together: So many of them make one batch of that estimate.
        seed: For what is drawn at random.
        rhythm: When to save besides.
        check_ranks: Whether to compare the processes' models after every step.

    Raises:
        UserError: A loss or gradient is not finite; the last good checkpoint is kept. Or the
            processes' models differ.
        Interrupted: A signal asked to stop; a checkpoint was saved after the step under way.
    """
    optimizer, ranks, rhythm = step.optimizer, step.ranks, rhythm or Rhythm()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    done, best, seconds, sums = 0, -math.inf, 0.0, Sums()
    ranks.equalize(step.model)
    if step.evaluated is not step.model:
        ranks.equalize(step.evaluated)
    state = ranks.share(lambda: checkpoints.load(key))
    if state is not None:
        load_state(step.evaluated, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step.load_state_dict(state["step"])
        done, best, seconds = state["epoch"], state["best_top1_percent"], state["seconds"]
        sums = Sums(**state["sums"])
        within = f", {sums.batches} steps of the next" if sums.batches else ""
        log.info("%s: continuing after epoch %d of %d%s", stage, done, epochs, within)
    on_start(done, seconds)
    last, whole = data.train.size(len(data.train) - 1), data.train.size(0)
    if last > whole and done < epochs:
        log.info(
            "%s: the last step of an epoch takes %d images: %d left over would be too few for a "
            "step of their own",
            stage,
            last,
            last - whole,
        )

    def save(seconds: float, best_so_far: bool = False) -> None:
        if ranks.is_main:
            content = {
                "key": key,
                "epoch": done,
                "sums": {**vars(sums), "loss": sums.loss.cpu()},
                "best_top1_percent": best,
                "seconds": seconds,
                "model": step.evaluated.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step.state_dict(),
            }
            checkpoints.save(content, best=best_so_far)
        rhythm.saved()

    def after_step(so_far: Sums) -> None:
        nonlocal sums
        sums = so_far
        if check_ranks:
            require_equal(ranks, step.model, done * len(data.train) + sums.batches)
        stop, due = ranks.largest(received(), rhythm.due(sums.batches))
        if stop or (due and sums.batches < len(data.train)):
            step.finish_epoch()
            save(seconds + time.perf_counter() - began)
        if stop:
            raise Interrupted(stop)

    total_steps = epochs * len(data.train)
    with (
        held() as received,
        Progress(stage, total=epochs, done=done) as progress,
    ):
        for epoch in range(done, epochs):
            began = time.perf_counter()
            train = TimedBatches(data.train)
            train_loss = train_epoch(
                step,
                train,
                epoch,
                lambda done: schedule(done / total_steps),
                seed=seed,
                sums=sums,
                after_step=after_step,
            )
            speed = train.throughput(time.perf_counter() - began)
            if batch_norm_images:
                images = first_images(data.train, epoch, batch_norm_images, batch_norm_together)
                reestimate_batch_norm(step.evaluated, images)
                ranks.equalize(step.evaluated)
            watched = evaluate(step.evaluated, data.validation, ranks)
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
            if ranks.is_main:
                on_epoch(report, step.evaluated)
            is_best = watched.top1_percent > best
            done, best, sums = epoch + 1, max(best, watched.top1_percent), Sums()
            save(seconds, is_best)
            left = seconds / done * (epochs - done)
            progress.advance(
                f"loss {train_loss:.3f}, validation {watched.top1_percent:.1f} %, "
                f"{speed.images_per_second:.0f} images/s, {speed.data_wait_percent:.0f} % of it "
                f"waiting for data, peak {speed.peak_memory_bytes / 1e6:.0f} MB, "
                f"{duration(left)} left"
            )
            (stop,) = ranks.largest(received())
            if stop:
                raise Interrupted(stop)
    step.finish()


def require_equal(ranks: Ranks, model: nn.Module, step: int) -> None:
    """Checks that all processes hold the same bits.

    Raises:
        UserError: A process differs from rank 0.
    """
    digests = ranks.gather(weights_digest(model))
    odd = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise UserError(
            f"trainer.check_ranks: after step {step} the model of rank {', '.join(odd)} differs "
            "from that of rank 0; the last checkpoint is from before; please report this"
        )


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the CPU's generator and that of one GPU; the others' would cost time at every step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
