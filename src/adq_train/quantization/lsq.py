"""LSQ: weights and activations with a learned step (Esser et al. 2020, arXiv 1902.08153)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adq_train.quantization.base import ActivationQuantizer, WeightQuantizer
from adq_train.quantization.functional import round_ste, scale_gradient


def lsq(x: Tensor, step: Tensor, low: int, high: int, num_elements: int) -> Tensor:
    """LSQ's quantizer, equations 1–3 of the paper.

    ŷ = step · round(clip(x / step, low, high)), with the straight-through gradient of the
    rounding and the gradient of the step multiplied by 1 / sqrt(num_elements · high).

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


def initial_step(values: Tensor, high: int) -> Tensor:
    """The paper's initialisation, 2 · mean|x| / sqrt(high); 1 for a tensor of zeros."""
    step = 2 * values.detach().float().abs().mean() / high**0.5
    return torch.where(step > 0, step, 1.0)


class LsqWeightQuantizer(WeightQuantizer):
    """Signed weights with one learned step per layer: codes -2^(b-1) … 2^(b-1) - 1.

    Args:
        bit_width: b, 2 … 8.
    """

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.low: int = -(2 ** (bit_width - 1))
        self.high: int = 2 ** (bit_width - 1) - 1
        self.step = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def calibrate(self, values: Tensor, seed: int = 0) -> None:
        """Initialises the step from a weight tensor."""
        if not torch.isfinite(values).all():
            raise ValueError("the weights hold NaN or infinite values")
        self.step.copy_(initial_step(values, self.high))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized weights of the same shape."""
        return lsq(x, self.step, self.low, self.high, x.numel())

    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        codes = (x / self.step).clamp(self.low, self.high).round()
        return (codes - self.low).to(torch.uint8)

    def levels(self) -> Tensor:
        """The 2^b uniform levels."""
        codes = torch.arange(self.low, self.high + 1, device=self.step.device)
        return codes * self.step.detach()


class LsqActivationQuantizer(ActivationQuantizer):
    """A learned step on a layer's input: codes 0 … 2^b - 1, signed where calibration asks for it.

    Args:
        bit_width: b, 2 … 8.
    """

    zero_point: Tensor

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self.low: int = 0
        self.high: int = 2**bit_width - 1

    @torch.no_grad()
    def calibrate(self, values: Tensor, seed: int = 0) -> None:
        """Initialises the step from a sample of inputs; negative values make the range signed."""
        if not torch.isfinite(values).all():
            raise ValueError("the inputs hold NaN or infinite values")
        self._set_signed(bool(values.min() < 0))
        self.step.copy_(initial_step(values, self.high))

    def _set_signed(self, signed: bool) -> None:
        self.low = -(2 ** (self.bit_width - 1)) if signed else 0
        self.high = self.low + 2**self.bit_width - 1
        self.zero_point.fill_(-self.low)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized input of shape (N, …)."""
        features = x[0].numel() if x.dim() > 1 else x.numel()
        return lsq(x, self.step, self.low, self.high, features)

    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        codes = (x / self.step).clamp(self.low, self.high).round()
        return (codes - self.low).to(torch.uint8)

    def levels(self) -> Tensor:
        """The 2^b uniform levels."""
        codes = torch.arange(self.low, self.high + 1, device=self.step.device)
        return codes * self.step.detach()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._set_signed(bool(self.zero_point > 0))
