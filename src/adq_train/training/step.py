"""One optimizer step: loss, gradients, and the upkeep of the quantizers around it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from adq_train.errors import UserError
from adq_train.quantization.functional import at_least_float32
from adq_train.quantization.prepare import Upkeep
from adq_train.states import load_state
from adq_train.training.average import WeightAverage
from adq_train.training.batch_norm import batch_norms
from adq_train.training.compiling import compiled
from adq_train.training.distillation import Teacher
from adq_train.training.distributed import ALONE, Ranks
from adq_train.training.health import (
    NOWHERE,
    STEPS_AHEAD,
    LateFlags,
    all_finite,
    clear_unless,
    origin,
)
from adq_train.training.optimizers import Optimizers

log = logging.getLogger(__name__)

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

Mix = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def part_sizes(num_images: int, count: int) -> list[int]:
    """Sizes of the parts of a batch, as of ``Tensor.chunk``.

    A last part of a single image joins the part before it, unless all are so small: a batch norm
    over 1 × 1 pixels cannot be trained on it.
    """
    size = -(-num_images // count)
    sizes = [min(size, num_images - start) for start in range(0, num_images, size)]
    return [*sizes[:-2], size + 1] if size > 1 == sizes[-1] and len(sizes) > 1 else sizes


class TrainingStep:
    """What happens to a model with every batch; codebooks adapt after each optimizer step.

    Every step is checked: it stops where loss, gradients or batch norm's statistics are not
    finite. On a GPU this is noticed two steps later, since reading a value at once would stall it;
    gradients are cleared until then, and no checkpoint is written.

    Args:
        model: Float or prepared, from images (N, …) to logits (N, num_classes).
        optimizer: Over the model's parameters.
        label_smoothing: Share of the target's probability spread over all classes.
        gradient_clip_norm: Largest L2 norm of the gradients, or None.
        accumulate_batches: Parts that each batch is cut into; their gradients are added up before
            the step, weighted by their images.
        precision: ``float32``, or ``tf32`` (the same here; :mod:`adq_train.training.device` sets
            it), or ``bf16`` or ``fp16`` for the layers that autocast trusts with it; quantizers,
            loss and weights stay in float32. ``fp16`` scales the loss.
        channels_last: Whether weights and images are laid out channel by channel of each pixel.
        compile: ``none``, ``quantizers`` or ``model``.
        skip_nonfinite_steps: So many steps that are not finite are left out before one stops the
            training; with more than 0 each step waits for its flag.
        average_decay: Decay of the weights' average; 0 for none.
        mix: Maps images, targets and the step to a mixed batch.
        teacher: For distillation.
        ranks: The processes that share each batch; all end the step with the same bits.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Optimizers,
        *,
        label_smoothing: float = 0.0,
        gradient_clip_norm: float | None = None,
        accumulate_batches: int = 1,
        precision: str = "float32",
        channels_last: bool = False,
        compile: str = "none",
        skip_nonfinite_steps: int = 0,
        average_decay: float = 0.0,
        mix: Mix | None = None,
        teacher: Teacher | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.model = model
        self.optimizer = optimizer
        self.label_smoothing = label_smoothing
        self.gradient_clip_norm = gradient_clip_norm
        self.accumulate_batches = accumulate_batches
        self.dtype = PRECISIONS[precision]
        self.channels_last = channels_last
        self.skip_nonfinite_steps = skip_nonfinite_steps
        self.mix = mix
        self.teacher = teacher
        self.ranks = ranks
        self.skipped = 0
        self._device = next(model.parameters()).device
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")
        self._upkeep = Upkeep(model)
        self._norms = list(batch_norms(model).values())
        self._average = WeightAverage(model, average_decay) if average_decay else None
        self._late = LateFlags(STEPS_AHEAD if self._device.type == "cuda" else 0)
        self._forward = compiled(model, compile)

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate and to keep: the average, or the one that is trained."""
        return self._average.model if self._average else self.model

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """Trains on one batch.

        Args:
            images: (N, C, H, W), this process's part of the batch; may be empty.
            targets: (N,) int64.
            step: Finished optimizer steps.

        Returns:
            The mean loss () over all processes, detached, on the device; 0 where it is not finite
            and the step was left out.

        Raises:
            UserError: This step or one shortly before it is not finite.
        """
        if self.mix is not None and len(images):
            images, targets = self.mix(images, targets, step)
        if self.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        statistics = self._statistics()
        loss = self._gradients(images, targets)
        self._average_over_ranks(loss, len(images))
        self._scaler.unscale_(self.optimizer)  # type: ignore[arg-type]  # needs groups alone
        self._upkeep.before_step()
        finite = all_finite(loss, self.model.parameters(), self._norms)
        if self._scaler.is_enabled() or self.skip_nonfinite_steps:
            if not finite:
                self._leave_out(images, targets, step, loss, statistics)
                return torch.where(torch.isfinite(loss), loss, 0)
        else:
            if self._late.steps_ahead:
                clear_unless(finite, self.model.parameters())
            self._late.add(step, finite, images, targets)
            self._require_finite(self._late.steps_ahead)
        if self.gradient_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip_norm)
        self._scaler.step(self.optimizer)  # type: ignore[arg-type]
        self._scaler.update()
        self._upkeep.after_step(step + 1)
        if self._average:
            self._average.update(self.model, step + 1)
        return loss

    def _gradients(self, images: Tensor, targets: Tensor) -> Tensor:
        """Sets the gradients of the mean loss, which it returns, (), detached."""
        self.optimizer.zero_grad(set_to_none=True)
        if not len(images):  # fewer images than processes
            return torch.zeros((), device=self._device)
        total: Tensor | None = None
        sizes = part_sizes(len(images), self.accumulate_batches)
        for some, wanted in zip(
            torch.split(images, sizes), torch.split(targets, sizes), strict=True
        ):
            low = self.dtype != torch.float32
            with torch.autocast(self._device.type, self.dtype if low else None, enabled=low):
                loss = self._loss(some, wanted)
            if len(some) != len(images):
                loss = loss * (len(some) / len(images))
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

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
            norm.get_buffer(f"running_{x}") for norm in self._norms for x in ("mean", "var")
        ]
        self.ranks.average([loss, *gradients, *statistics], num_images)
        for norm in self._norms:
            if not num_images and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
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
            precise = at_least_float32(logits)
            return F.cross_entropy(precise, targets, label_smoothing=self.label_smoothing)

        return self.teacher.loss(logits, images, label_loss) if self.teacher else label_loss()

    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Batch norm's buffers with copies, where a step may be undone."""
        if not self.skip_nonfinite_steps:
            return []
        return [(buffer, buffer.clone()) for norm in self._norms for buffer in norm.buffers()]

    def _leave_out(
        self,
        images: Tensor,
        targets: Tensor,
        step: int,
        loss: Tensor,
        statistics: list[tuple[Tensor, Tensor]],
    ) -> None:
        """Skips a step that is not finite, within the limit.

        Raises:
            UserError: The limit is exceeded.
        """
        # A scale that was too large for fp16 is not a fault: the scaler finds a smaller one.
        overflow = self._scaler.is_enabled() and self._scaler.get_scale() > 1
        if self._scaler.is_enabled():
            self._scaler.update()
        if overflow and all_finite(loss, (), self._norms):
            log.debug("step %d: the gradients exceed fp16; the scale is halved", step + 1)
            return
        self.skipped += 1
        if self.skipped > self.skip_nonfinite_steps:
            self._stop(images, targets, step)
        for buffer, value in statistics:
            buffer.copy_(value)
        log.warning(
            "step %d is not finite and left out (%d of at most %d, trainer.skip_nonfinite_steps)",
            step + 1,
            self.skipped,
            self.skip_nonfinite_steps,
        )

    def _require_finite(self, steps_ahead: int) -> None:
        late = self._late.failed(steps_ahead)
        if late is not None:
            self._stop(late.images, late.targets, late.step)

    def _stop(self, images: Tensor, targets: Tensor, step: int) -> None:
        """Names the layer where it began.

        Raises:
            UserError: Always.
        """
        where = NOWHERE
        if len(images):
            where = origin(self.model, images, lambda: self._gradients(images, targets))
        found = [x for x in self.ranks.gather(where) if x != NOWHERE]
        where = found[0] if found else NOWHERE
        raise UserError(
            f"step {step + 1}: the loss or a gradient is not finite; it began in {where}; the last "
            "good checkpoint is kept; try a lower learning rate (optimizer.lr, pretrain.lr), "
            "trainer.gradient_clip_norm=1, trainer.precision=float32, or leave such steps out with "
            "trainer.skip_nonfinite_steps=10"
        )

    def finish_epoch(self) -> None:
        """Waits for the steps whose outcome is still on its way.

        Raises:
            UserError: One of them is not finite.
        """
        self._require_finite(0)

    def finish(self) -> None:
        """Gives the trained model the weights that were evaluated."""
        if self._average:
            load_state(self.model, self._average.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides ``evaluated`` and the optimizer; tensors and plain types."""
        return {
            "skipped": self.skipped,
            "scaler": self._scaler.state_dict(),
            "trained": self.model.state_dict() if self._average else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave, after ``evaluated`` has its weights."""
        self.skipped = state["skipped"]
        self._scaler.load_state_dict(state["scaler"])
        if self._average:
            load_state(self.model, state["trained"])
