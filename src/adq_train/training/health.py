"""Values that are not finite: noticed without stalling a GPU, and traced to a layer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

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


def clear_unless(finite: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Sets all gradients to zero where ``finite`` () is false, without reading it."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(~finite, 0)


def origin(model: nn.Module, images: Tensor, run: Callable[[], object]) -> str:
    """Where values that are not finite begin, found by running a batch once more.

    Args:
        model: The network; its hooks and statistics are left as they were, its gradients are not.
        images: The batch's images.
        run: Runs the batch forward and backward.

    Returns:
        The first module in forward order with such an output, or else the first parameter with
        such a gradient, in words.
    """
    if not torch.isfinite(images).all():
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
class Late:
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


class LateFlags:
    """Reads whether each step was finite, once a few more steps are queued.

    Args:
        steps_ahead: Further steps before a flag is read.
    """

    def __init__(self, steps_ahead: int) -> None:
        self.steps_ahead = steps_ahead
        self.waiting: deque[Late] = deque()

    def add(self, step: int, finite: Tensor, images: Tensor, targets: Tensor) -> None:
        """Sends the flag of a step, () bool, on its way; the batch is kept until it arrives."""
        on_cpu = finite.to("cpu", non_blocking=True)
        # On the flag's own device, which need not be the current one.
        arrived = (
            torch.cuda.current_stream(finite.device).record_event() if finite.is_cuda else None
        )
        self.waiting.append(Late(step, on_cpu, images, targets, arrived))

    def failed(self, steps_ahead: int | None = None) -> Late | None:
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
