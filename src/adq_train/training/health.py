"""Values that are not finite: noticed without stalling a GPU, and traced to a layer."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from adq_train.errors import UserError
from adq_train.nested import tensors
from adq_train.training.hook import EpochReport, Hook
from adq_train.training.trainer import Trainer

log = logging.getLogger(__name__)

# Where this many further steps are queued, reading the flag of a step leaves no gap on a GPU.
STEPS_AHEAD = 2
NOWHERE = "no layer: when the batch was run again, all was finite"


def all_finite(
    loss: Tensor, parameters: Iterable[nn.Parameter], norms: Iterable[_BatchNorm] = ()
) -> Tensor:
    """Whether loss, gradients and running statistics are finite: a bool () on the device, not read.

    A quantizer maps NaN to a level, so that in a quantized network what comes before it may show
    in the statistics of a batch norm alone.

    Args:
        loss: ().
        parameters: Those without a gradient are left out.
        norms: Batch norms with running statistics.
    """
    values = [p.grad for p in parameters if p.grad is not None]
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        values += [norm.running_mean, norm.running_var]
    largest = get_total_norm(values, math.inf)  # the largest magnitude cannot overflow
    return torch.isfinite(loss) & torch.isfinite(largest)


def origin(model: nn.Module, images: Any, run: Callable[[], object]) -> str:
    """Where values that are not finite begin, found by running a batch once more.

    Args:
        model: The network; its hooks and statistics are left as they were, its gradients are not.
        images: The batch's images, or what else the network takes.
        run: Runs the batch forward and backward.

    Returns:
        The first module in forward order with such an output, or else the first parameter with
        such a gradient, in words.
    """
    if any(x.is_floating_point() and not torch.isfinite(x).all() for _, x in tensors(images)):
        return "the images of the batch"
    found: list[str] = []

    def record(name: str, module: nn.Module, inputs: object, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
            where = f"the output of {name} ({type(module).__name__})"
            found.append(where if name else "the model's output")

    handles = [
        module.register_forward_hook(lambda *x, name=name: record(name, *x))
        for name, module in model.named_modules()
    ]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        # A compiled module would not call the hooks inside it.
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for handle in handles:
            handle.remove()
        for buffer, value in before:
            buffer.copy_(value)
    if found:
        return found[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}"
    return NOWHERE


@dataclass(frozen=True)
class PendingFlag:
    """A step whose flag is on its way from the device.

    Attributes:
        step: Optimizer steps that were finished before it.
        finite: () bool on the CPU.
        images: The batch (N, C, H, W).
        targets: (N,) or (N, K).
        arrived: Happens when the flag is there; None where it is.
    """

    step: int
    finite: Tensor
    images: Tensor
    targets: Tensor
    arrived: torch.cuda.Event | None


class PendingFlags:
    """Reads whether each step was finite, once a few more steps are queued.

    Args:
        steps_ahead: Further steps before a flag is read.
    """

    def __init__(self, steps_ahead: int) -> None:
        self.steps_ahead = steps_ahead
        self.waiting: deque[PendingFlag] = deque()

    def add(self, step: int, finite: Tensor, images: Tensor, targets: Tensor) -> None:
        """Sends the flag of a step, () bool, on its way; the batch is kept until it arrives."""
        on_cpu = finite.to("cpu", non_blocking=True)
        # On the flag's own device, which need not be the current one.
        arrived = (
            torch.cuda.current_stream(finite.device).record_event() if finite.is_cuda else None
        )
        self.waiting.append(PendingFlag(step, on_cpu, images, targets, arrived))

    def failed(self, steps_ahead: int | None = None) -> PendingFlag | None:
        """The first due step that was not finite, or None.

        Args:
            steps_ahead: As in the constructor; 0 waits for every flag.
        """
        limit = self.steps_ahead if steps_ahead is None else steps_ahead
        while len(self.waiting) > limit:
            oldest = self.waiting.popleft()
            if oldest.arrived:
                oldest.arrived.synchronize()
            if not oldest.finite:
                return oldest
        return None


class FiniteWatch(Hook):
    """Stops a training where loss, gradients or batch norm's statistics are not finite.

    On a GPU this is noticed two steps later, since reading a value at once would stall it; steps
    leave the weights as they are until then, and no checkpoint is written.

    Args:
        stage: Shown in its messages.
        skip: So many steps that are not finite are left out before one stops the training; with
            more than 0 each step waits for its flag.
    """

    def __init__(self, stage: str = "training", skip: int = 0) -> None:
        self.stage = stage
        self.skip = skip
        self.skipped = 0
        self._pending: PendingFlags | None = None
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def on_batch(self, trainer: Trainer, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps batch norm's statistics, where the step may be undone."""
        if self.skip:
            buffers = [x for norm in trainer.norms for x in norm.buffers()]
            self._statistics = [(x, x.clone()) for x in buffers]
        return images, targets

    def on_gradients(self, trainer: Trainer, batch: tuple[Tensor, Tensor], loss: Tensor) -> bool:
        """Whether all is finite, or may be: a GPU's flag is read later.

        Raises:
            UserError: This step or one shortly before it is not finite, and none is to be left
                out any more.
        """
        finite = all_finite(loss, trainer.model.parameters(), trainer.norms)
        if trainer.scaler.is_enabled() or self.skip:
            return bool(finite) or self._leave_out(trainer, batch, loss)
        if self._pending is None:
            self._pending = PendingFlags(STEPS_AHEAD if trainer.device.type == "cuda" else 0)
        if self._pending.steps_ahead:
            trainer.optimizer.skip_unless(finite)
        self._pending.add(trainer.steps, finite, *batch)
        self._require_finite(trainer, self._pending.steps_ahead)
        return True

    def _leave_out(self, trainer: Trainer, batch: tuple[Tensor, Tensor], loss: Tensor) -> bool:
        """Skips a step that is not finite, within the limit.

        Raises:
            UserError: The limit is exceeded.
        """
        scaler, step = trainer.scaler, trainer.steps
        # A scale that was too large for fp16 is not a fault: the trainer finds a smaller one.
        overflow = scaler.is_enabled() and scaler.get_scale() > 1
        if overflow and all_finite(loss, (), trainer.norms):
            log.debug("step %d: the gradients exceed fp16; the scale is halved", step + 1)
            return False
        self.skipped += 1
        if self.skipped > self.skip:
            self._stop(trainer, batch, step)
        for buffer, value in self._statistics:
            buffer.copy_(value)
        log.warning(
            "step %d is not finite and left out (%d of at most %d, trainer.skip_nonfinite_steps)",
            step + 1,
            self.skipped,
            self.skip,
        )
        return False

    def _require_finite(self, trainer: Trainer, steps_ahead: int) -> None:
        late = self._pending.failed(steps_ahead) if self._pending else None
        if late is not None:
            self._stop(trainer, (late.images, late.targets), late.step)

    def _stop(self, trainer: Trainer, batch: tuple[Tensor, Tensor], step: int) -> None:
        """Names the layer where it began.

        Raises:
            UserError: Always.
        """
        where = NOWHERE
        if len(batch[0]):
            where = origin(trainer.model, batch[0], lambda: trainer.gradients(*batch))
        found = [x for x in trainer.ranks.all_gather(where) if x != NOWHERE]
        where = found[0] if found else NOWHERE
        raise UserError(
            f"step {step + 1}: the loss or a gradient is not finite; it began in {where}; the last "
            "good checkpoint is kept; try a lower learning rate (optimizer.lr, pretrain.lr), "
            "trainer.gradient_clip_norm=1, trainer.precision=float32, or leave such steps out with "
            "trainer.skip_nonfinite_steps=10"
        )

    def flush(self, trainer: Trainer) -> None:
        """Waits for the steps whose outcome is still on its way.

        Raises:
            UserError: One of them is not finite.
        """
        self._require_finite(trainer, 0)

    def after_epoch(self, trainer: Trainer, report: EpochReport) -> None:
        """Looks at the losses of an epoch.

        Raises:
            UserError: One is not finite.
        """
        losses = (("training", report.train_loss), ("validation", report.validation_loss))
        for what, loss in losses:
            if not math.isfinite(loss):
                raise UserError(
                    f"{self.stage}: the {what} loss is {loss} in epoch {report.epoch}; the last "
                    "good checkpoint is kept; try a lower learning rate or "
                    "trainer.gradient_clip_norm=1"
                )

    def state_dict(self) -> dict[str, Any]:
        """How many steps were left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes that back."""
        self.skipped = state["skipped"]
