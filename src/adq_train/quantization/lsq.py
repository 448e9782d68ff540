"""LSQ: weights and activations with a learned step (Esser et al. 2020, arXiv 1902.08153)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from adq_train.quantization.base import RangedActivationQuantizer, WeightQuantizer
from adq_train.quantization.functional import at_least_float32, positive, round_ste, scale_gradient


def lsq(x: Tensor, step: Tensor, low: int, high: int, num_elements: int) -> Tensor:
    """LSQ's quantizer, equations 1–3 of the paper.

    ŷ = step · round(clip(x / step, low, high)), with the straight-through gradient of the
    rounding and the gradient of the step multiplied by 1 / sqrt(num_elements · high). A value
    exactly on an end of the range counts as within it; in equation 3 it counts as beyond.

    Args:
        x: Any shape.
        step: () positive.
        low: Smallest code, ≤ 0.
        high: Largest code, > 0.
        num_elements: Weights of a layer, or features of one input.

    Returns:
        The shape of ``x``.
    """
    step = scale_gradient(step, (num_elements * high) ** -0.5)
    return round_ste((x / step).clamp(low, high)) * step


def lsq_indices(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Equation 1 of the paper, counted from ``low``: round(clip(x / step, low, high)) - low, uint8.

    Args:
        x: Any shape.
        step: () positive.
        low: Smallest code, ≤ 0.
        high: Largest code, > 0.
    """
    codes = (at_least_float32(x) / step).clamp(low, high).round()
    return (codes - low).to(torch.uint8)


def initial_step(values: Tensor, high: int) -> Tensor:
    """The paper's initialisation (section 2.1), 2 · mean|x| / sqrt(high); 1 for zeros.

    Args:
        values: Any shape.
        high: Largest code, Q_P.
    """
    step = 2 * values.float().abs().mean() / high**0.5
    return torch.where(step > 0, step, 1.0)


class LsqWeightQuantizer(WeightQuantizer):
    """Signed weights with one learned step per layer: codes -2^(b-1) … 2^(b-1) - 1.

    Section 2 of the paper: Q_N = 2^(b-1) and Q_P = 2^(b-1) - 1 for weights. The gradient of the
    step is that of equation 3 times 1 / sqrt(N · Q_P) (section 2.2), with N the number of weights.
    The step is used by its magnitude, so that levels stay in order.

    Args:
        bit_width: b, 2 … 8.

    Raises:
        ValueError: ``bit_width`` lies outside its range.
    """

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.low: int = -(2 ** (bit_width - 1))
        self.high: int = 2 ** (bit_width - 1) - 1
        self.step = nn.Parameter(torch.ones(()))

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises the step from a weight tensor of any shape."""
        self.step.copy_(initial_step(values, self.high))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized weights of the same shape."""
        x = at_least_float32(x)
        return lsq(x, positive(self.step), self.low, self.high, x.numel())

    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        return lsq_indices(x, positive(self.step), self.low, self.high)

    def levels(self) -> Tensor:
        """The 2^b uniform levels."""
        codes = torch.arange(self.low, self.high + 1, device=self.step.device)
        return codes * positive(self.step.detach())


class StepQuantizer(RangedActivationQuantizer):
    """A learned step on a value: codes 0 … 2^b - 1, signed where calibration asks for it.

    Section 2 of the paper: Q_N = 0 and Q_P = 2^b - 1 for unsigned data, as weights otherwise.
    N of the gradient's scale is the number of features of one input (section 2.2).

    Args:
        bit_width: b, 2 … 8.

    Raises:
        ValueError: ``bit_width`` lies outside its range.
    """

    is_uniform = True

    @abstractmethod
    def width(self) -> Tensor:
        """The step (), positive, with its gradient."""

    def code_range(self, signed: bool) -> tuple[int, int]:
        """Smallest and largest code: all 2^b of them, also in a signed range."""
        low = -(2 ** (self.bit_width - 1)) if signed else 0
        return low, low + 2**self.bit_width - 1

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized values of shape (N, …)."""
        x = at_least_float32(x)
        features = x.shape[1:].numel() if x.dim() > 1 else x.numel()
        return lsq(x, self.width(), self.low, self.high, features)

    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        return lsq_indices(x, self.width(), self.low, self.high)

    def levels(self) -> Tensor:
        """The 2^b uniform levels."""
        return self.codes() * self.width().detach()


class LsqActivationQuantizer(StepQuantizer):
    """LSQ's learned step on a layer's input, used by its magnitude; see :class:`StepQuantizer`."""

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.step = nn.Parameter(torch.ones(()))

    def width(self) -> Tensor:
        """The step (), with its gradient."""
        return positive(self.step)

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises the step from a sample of inputs; negative values make the range signed."""
        self.set_signed(bool(values.min() < 0))
        self.step.copy_(initial_step(values, self.high))
