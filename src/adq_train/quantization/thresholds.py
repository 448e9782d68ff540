"""What activation quantizers with learned thresholds share (N2UQ, arXiv 2111.14826)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from adq_train.quantization.base import ActivationQuantizer
from adq_train.quantization.fitting import best_clip
from adq_train.quantization.functional import at_least_float32, midpoints
from adq_train.quantization.steps import GeneralizedSTE, interval_edges

# Widths stay this much wider than nothing, as a share of the mean width, when data repeats values.
SMALLEST_WIDTH = 1e-2


def uniform_range(sample: Tensor, num_steps: int) -> tuple[Tensor, Tensor, int]:
    """Evenly spaced intervals over the range whose clipping makes the squared error smallest.

    Args:
        sample: (n,) values; negative ones ask for a signed range.
        num_steps: N, the number of intervals.

    Returns:
        Start (), width of each interval (), and the code that stands for 0 (none below it for
        values that are never negative).
    """
    low, high = sample.min().clamp_max(0), sample.max().clamp_min(0)
    zero_point = 0
    if low < 0:
        zero_point = min(max(round(float(-low / (high - low)) * num_steps), 1), num_steps - 1)
    step = best_clip(sample, zero_point, num_steps - zero_point)
    return -zero_point * step, step, zero_point


class ThresholdQuantizer(ActivationQuantizer):
    """A step function of a layer's input whose thresholds are learned.

    The thresholds are the middles of N = 2^n - 1 intervals. Learned: the intervals' start, which
    counts the calibrated mean width, and their widths, as logarithms, which keeps them positive.
    So the same step of an optimizer means the same relative change in every layer. A subclass
    says which levels the thresholds separate.

    Args:
        bit_width: n.
    """

    zero_point: Tensor
    unit: Tensor

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.num_steps = 2**bit_width - 1
        self.start = nn.Parameter(torch.zeros(()))
        self.log_widths = nn.Parameter(torch.zeros(self.num_steps))
        self.register_buffer("unit", torch.ones(()))  # of the start
        self.register_buffer("zero_point", torch.zeros(()))  # the code whose level is 0

    @abstractmethod
    def learned_levels(self) -> Tensor:
        """The ascending levels (2^n,), with their gradients."""

    def set_intervals(self, start: Tensor, widths: Tensor) -> None:
        """Places the intervals.

        Args:
            start: ().
            widths: (N,) positive.
        """
        self.unit.copy_(widths.mean())
        self.start.copy_(start / self.unit)
        self.log_widths.copy_(widths.log())

    def edges(self) -> Tensor:
        """The intervals' edges (N + 1,), with their gradients."""
        return interval_edges(self.start * self.unit, self.log_widths.exp())

    def scaled(self, x: Tensor) -> Tensor:
        """What the thresholds are compared with: the input."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Maps an input of any shape to its levels."""
        start, widths = self.start * self.unit, self.log_widths.exp()
        quantized: Tensor = GeneralizedSTE.apply(
            self.scaled(x), start, widths, self.learned_levels()
        )
        return quantized

    def quantize(self, x: Tensor) -> Tensor:
        """Codes in ``0 … 2^n - 1``, uint8, of the shape of ``x``."""
        return torch.bucketize(at_least_float32(self.scaled(x)).contiguous(), self.thresholds()).to(
            torch.uint8
        )

    def levels(self) -> Tensor:
        """The levels (2^n,)."""
        return self.learned_levels().detach()

    def thresholds(self) -> Tensor:
        """The N thresholds T_i, sorted, on the scaled input."""
        return midpoints(self.edges()).detach()
