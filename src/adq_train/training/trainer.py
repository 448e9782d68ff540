"""The training loop, for float models and for quantized ones; all but the step is hooks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.data.base import ImageData, derived_seed
from adq_train.errors import UserError
from adq_train.quantization.functional import at_least_float32
from adq_train.quantization.prepare import Upkeep
from adq_train.settings.schema import TrainerConfig
from adq_train.training.batch_norm import batch_norms
from adq_train.training.compiling import compiled
from adq_train.training.distributed import ALONE, Ranks
from adq_train.training.evaluate import evaluate
from adq_train.training.hook import EpochReport, Hook
from adq_train.training.optimizers import Optimizers
from adq_train.training.throughput import TimedBatches

DEFAULTS = TrainerConfig()
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def part_sizes(num_images: int, count: int) -> list[int]:
    """Sizes of the parts of a batch, as of ``Tensor.chunk``.

    A last part of a single image joins the part before it, unless all are so small: a batch norm
    over 1 × 1 pixels cannot be trained on it.
    """
    size = -(-num_images // count)
    sizes = [min(size, num_images - start) for start in range(0, num_images, size)]
    return [*sizes[:-2], size + 1] if size > 1 == sizes[-1] and len(sizes) > 1 else sizes


def balanced(data: ImageData) -> Tensor:
    """N / (K N_c) for each class, (num_classes,): over the training images the mean weight is 1.

    Args:
        data: N_c of its N training images are of class c, K classes have any.

    Raises:
        UserError: The data set does not say how many there are.
    """
    counts = torch.tensor(data.class_counts, dtype=torch.float32)
    if len(counts) != data.num_classes or not counts.sum():
        raise UserError(
            f"trainer.class_weights: {data.name} does not say how many images each class has; "
            "its load() can give class_counts, or set class_weights=none"
        )
    weights = counts.sum() / ((counts > 0).sum() * counts)
    return torch.where(counts > 0, weights, 0.0)


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
    loss: Tensor = torch.zeros((), dtype=torch.float64)

    def plus(self, images: int, loss: Tensor) -> Sums:
        """With one more batch of some images and their mean loss ()."""
        total = self.loss + loss.double() * images  # 0-dimensional: may come from the CPU
        return Sums(self.batches + 1, self.images + images, total)


class Trainer:
    """Trains a model; order, augmentation, dropout and rates are functions of seed and step.

    So a training that was interrupted ends with the same weights as one that was not. Nothing
    that is not a hook's is kept between steps but the model, the optimizer, the scale of the loss
    and the counts below.

    Args:
        model: Float or prepared, from images (N, …) to logits (N, K); trained in place.
        optimizer: Of its parameters, with the course of its rates.
        data: Trains on ``train``, watches ``validation``.
        hooks: What happens besides, in this order.
        settings: Epochs, precision and what else belongs to the step.
        seed: For what is drawn at random in the network (dropout).
        ranks: The processes that share each batch; all end each step with the same bits.

    Attributes:
        epoch: Finished epochs.
        sums: Of the epoch under way.
        seconds: That the finished epochs took.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        data: ImageData,
        hooks: Sequence[Hook] = (),
        *,
        settings: TrainerConfig = DEFAULTS,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model, self.optimizer, self.data = model, optimizer, data
        self.hooks, self.settings, self.seed, self.ranks = hooks, settings, seed, ranks
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.norms = list(batch_norms(model).values())
        self.class_weights = (
            balanced(data).to(self.device) if settings.class_weights == "balanced" else None
        )
        self.epoch, self.sums, self.seconds, self.began = 0, Sums(), 0.0, 0.0
        self._upkeep = Upkeep(model)
        self._forward = compiled(model, settings.compile)

    @property
    def steps(self) -> int:
        """Finished steps, those that were left out included."""
        return self.epoch * len(self.data.train) + self.sums.batches

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate and to keep."""
        found = [x for x in (hook.evaluated() for hook in self.hooks) if x is not None]
        return found[-1] if found else self.model

    def fit(self) -> None:
        """Trains to the last epoch.

        Raises:
            UserError: A batch norm cannot be trained on one image, or what a hook raises.
        """
        for model in dict.fromkeys((self.model, self.evaluated)):
            self.ranks.broadcast_model(model)
        for hook in self.hooks:
            hook.restore(self)
        for hook in self.hooks:
            hook.on_start(self)
        with contextlib.ExitStack() as contexts:
            for hook in self.hooks:
                contexts.enter_context(hook.context(self))
            while self.epoch < self.settings.epochs:
                self.train_epoch()
        for hook in self.hooks:
            hook.on_end(self)

    def train_epoch(self) -> EpochReport:
        """One epoch or the rest of it, its evaluation, and what the hooks make of that."""
        self.began = time.perf_counter()
        self.model.train()
        batches = TimedBatches(self.data.train)
        rest = slice(self.sums.batches, None)
        total = self.settings.epochs * len(batches)
        for images, targets in batches.epoch(self.epoch, rest, self.ranks.own):
            self.optimizer.at(self.steps / total)
            seed_generators(
                derived_seed(self.seed, "step", self.steps, self.ranks.rank), self.device
            )
            loss = self.step(images, targets)
            self.sums = self.sums.plus(batches.size(self.sums.batches), loss)
            for hook in self.hooks:
                hook.after_batch(self)
        for hook in self.hooks:
            hook.flush(self)
        speed = batches.throughput(time.perf_counter() - self.began)
        for hook in self.hooks:
            hook.before_evaluation(self)
        watched = evaluate(self.evaluated, self.data.validation, self.ranks)
        self.seconds += time.perf_counter() - self.began
        report = EpochReport(
            epoch=self.epoch + 1,
            step=self.steps,
            train_loss=float(self.sums.loss) / self.sums.images,
            validation_loss=watched.loss,
            validation_top1_percent=watched.top1_percent,
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=self.seconds,
            **vars(speed),
        )
        self.epoch, self.sums = self.epoch + 1, Sums()
        for hook in self.hooks:
            hook.after_epoch(self, report)
        return report

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step: forward, loss, backward, step, and codebooks that follow.

        Args:
            images: (N, C, H, W), this process's part of the batch; may be empty.
            targets: (N,) int64.

        Returns:
            The mean loss () over all processes, detached, on the device; 0 where it is not finite
            and the step was left out.
        """
        for hook in self.hooks:
            images, targets = hook.on_batch(self, images, targets)
        loss = self.gradients(images, targets)
        self._average_over_ranks(loss, len(images))
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]  # needs groups alone
        self._upkeep.before_step()
        taken = [hook.on_gradients(self, (images, targets), loss) for hook in self.hooks]
        if not all(taken):
            self.scaler.update()
            return torch.where(torch.isfinite(loss), loss, 0)
        if self.settings.gradient_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip_norm)
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]
        self.scaler.update()
        self._upkeep.after_step()
        for hook in self.hooks:
            hook.after_update(self, self.steps + 1)
        return loss

    def gradients(self, images: Tensor, targets: Tensor) -> Tensor:
        """Sets the gradients of the mean loss of a batch, which it returns, (), detached."""
        self.optimizer.zero_grad(set_to_none=True)
        if not len(images):  # fewer images than processes
            return torch.zeros((), device=self.device)
        if self.settings.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = PRECISIONS[self.settings.precision]
        low = dtype != torch.float32
        losses = []
        sizes = part_sizes(len(images), self.settings.accumulate_batches)
        for some, wanted in zip(
            torch.split(images, sizes), torch.split(targets, sizes), strict=True
        ):
            with torch.autocast(self.device.type, dtype if low else None, enabled=low):
                loss = self.loss(some, wanted)
            if len(some) != len(images):
                loss = loss * (len(some) / len(images))
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return sum(losses[1:], losses[0])

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of some images, ().

        Raises:
            UserError: A batch norm cannot be trained on one image.
        """
        try:
            logits = self._forward(images)
        except (ValueError, RuntimeError) as error:  # of torch, or of its compiler
            if len(images) > 1 or "more than 1 value per channel" not in str(error):
                raise
            least = 2 * self.ranks.world_size
            raise UserError(
                "trainer.batch_size: a batch norm over 1 × 1 pixels cannot be trained on one image "
                f"at a time; set trainer.batch_size to at least {least}, which gives every process "
                "two images, and leave as many to train on"
            ) from error

        def label_loss() -> Tensor:
            smoothing, weights = self.settings.label_smoothing, self.class_weights
            scores = at_least_float32(logits)
            if weights is None:
                return F.cross_entropy(scores, targets, label_smoothing=smoothing)
            # The mean over the images, not over their weights: parts of a batch then add up.
            return F.cross_entropy(
                scores, targets, weights, label_smoothing=smoothing, reduction="none"
            ).mean()

        loss: Callable[[], Tensor] = label_loss
        for hook in self.hooks:
            loss = partial(hook.loss, logits, images, loss)
        return loss()

    def _average_over_ranks(self, loss: Tensor, num_images: int) -> None:
        """Gives loss, gradients and batch norm's statistics their mean over all images, in place.

        Within a process, batch norm normalises with the statistics of its own images. A parameter
        without a gradient gets one of zeros where there are several processes.
        """
        if self.ranks.world_size == 1:
            return
        gradients = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        statistics = [
            norm.get_buffer(f"running_{x}") for norm in self.norms for x in ("mean", "var")
        ]
        self.ranks.all_reduce_mean([loss, *gradients, *statistics], num_images)
        for norm in self.norms:
            if not num_images and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides the evaluated network; tensors and plain types."""
        scaler: dict[str, Any] = {"scaler": self.scaler.state_dict()}
        for hook in self.hooks:
            scaler |= hook.state_dict()
        return {
            "epoch": self.epoch,
            "sums": {**vars(self.sums), "loss": self.sums.loss.cpu()},
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
            "step": scaler,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave, after :attr:`evaluated` has its weights."""
        self.epoch, self.sums = state["epoch"], Sums(**state["sums"])
        self.seconds = state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["step"]["scaler"])
        for hook in self.hooks:
            hook.load_state_dict(state["step"])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the CPU's generator and that of one GPU; the others' would cost time at every step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
