"""N2UQ: activations with learned thresholds, weights scaled per channel.

Liu et al. 2022 (arXiv 2111.14826).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adq_train.quantization.base import EvenWeightQuantizer, check_choice
from adq_train.quantization.fitting import quantiles
from adq_train.quantization.functional import StraightThrough, at_least_float32
from adq_train.quantization.thresholds import SMALLEST_WIDTH, ThresholdQuantizer, uniform_range

INITIALIZATIONS = ("mse", "quantile")


def quantile_intervals(sample: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Intervals that hold equal shares of the values that are not zero.

    Args:
        sample: (n,) values. Zeros are left out: after a ReLU they would fill half of the range.
        num_steps: N, the number of intervals.

    Returns:
        Start () and widths (N,), positive.
    """
    ordered = sample[sample != 0].sort().values
    if len(ordered) == 0:
        return sample.new_zeros(()), sample.new_full((num_steps,), 1 / num_steps)
    fractions = torch.arange(num_steps + 1, device=sample.device) / num_steps
    edges = quantiles(ordered, fractions)
    # Zero belongs to the range: it bounds values of one sign.
    if ordered[0] > 0:
        edges[0] = 0
    if ordered[-1] < 0:
        edges[-1] = 0
    mean_width = (edges[-1] - edges[0]).clamp_min(torch.finfo(edges.dtype).tiny) / num_steps
    return edges[0], edges.diff().clamp_min(SMALLEST_WIDTH * mean_width)


class N2uqActivationQuantizer(ThresholdQuantizer):
    """Non-uniform-to-uniform quantization of a layer's input.

    Learned: the thresholds (see :class:`~.thresholds.ThresholdQuantizer`), the step between the
    levels ``step · (code - zero_point)``, as a logarithm, and optionally an input scale.

    Args:
        bit_width: n; there are N = 2^n - 1 thresholds.
        initialization: ``mse``: evenly spaced thresholds over the range whose clipping makes the
            squared error smallest; ``quantile``: thresholds with equal mass between them.
        learn_input_scale: Whether a factor on the input is learned too, as in N2UQ; thresholds
            can express it already, so it changes the dynamics of training alone.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self, bit_width: int, *, initialization: str = "mse", learn_input_scale: bool = False
    ) -> None:
        super().__init__(bit_width)
        check_choice("initialization", initialization, INITIALIZATIONS)
        self.initialization = initialization
        self.log_step = nn.Parameter(torch.zeros(()))
        self.log_input_scale = nn.Parameter(torch.zeros(()), requires_grad=learn_input_scale)

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises thresholds and step from a sample of inputs.

        A sample with negative values gets a signed range: the code ``zero_point`` stands for 0.
        """
        sample = values.float().flatten()
        start, step, zero_point = uniform_range(sample, self.num_steps)
        widths = step.expand(self.num_steps)
        if self.initialization == "quantile":
            start, widths = quantile_intervals(sample, self.num_steps)
        self.set_intervals(start, widths)
        self.log_input_scale.zero_()
        if self.initialization == "quantile":
            # From the thresholds in use: the logarithms may have moved one across zero.
            zero_point = int((self.thresholds() < 0).sum())
            # The step that fits the values best, given the codes that the thresholds assign.
            codes = self.quantize(sample).float() - zero_point
            fitted = (codes * sample).sum() / codes.square().sum().clamp_min(1)
            step = torch.where(fitted > 0, fitted, step)
        self.zero_point.fill_(zero_point)
        self.log_step.copy_(step.log())

    def scaled(self, x: Tensor) -> Tensor:
        """What the thresholds are compared with: the input times its learned scale."""
        if not self.log_input_scale.requires_grad:
            return x
        return at_least_float32(x) * self.log_input_scale.exp()

    def learned_levels(self) -> Tensor:
        """The uniform output levels (2^n,)."""
        codes = torch.arange(self.num_steps + 1, device=self.zero_point.device)
        return (codes - self.zero_point) * self.log_step.exp()


class N2uqWeightQuantizer(EvenWeightQuantizer):
    """N2UQ's own weights: uniform levels on [-1, 1] after a scale per output channel.

    The paper's entropy-preserving weight regularization divides each channel by

        s = (2^b - 1) / 2^(b-1) · mean|W|,

    at which weights of common distributions fill the levels about evenly. The result is clipped
    to [-1, 1] and rounded to 2^b evenly spaced levels, none of which is zero; the output is
    multiplied by s again. The mean is not subtracted. As in the authors' code, s follows the
    weights in every step, nothing is learned, no gradient passes through s, and clipped weights
    keep their gradient. That code passes the gradient of the scaled weights, that is, divided by
    s, which Adam cancels; here it passes as it is, so that other optimizers work too.

    Args:
        bit_width: b, 2 … 8.

    Raises:
        ValueError: ``bit_width`` lies outside its range.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized weights of the shape (C_out, …) of ``x``."""
        x = at_least_float32(x)
        value = self.base[self.quantize(x).long()] * self.output_scale(x)
        quantized: Tensor = StraightThrough.apply(x, value)
        return quantized

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        scale = self.output_scale(x)
        scaled = (at_least_float32(x) / torch.where(scale > 0, scale, 1.0)).clamp(-1, 1)
        return ((scaled + 1) / 2 * self.num_steps).round().to(torch.uint8)

    @torch.no_grad()
    def output_scale(self, weight: Tensor) -> Tensor:
        """The scale s of each channel, (C_out, 1, …); 0 where a channel is all zero."""
        # Flattened in logical order, so that the memory format does not change the sum.
        mean = at_least_float32(weight).flatten(1).abs().mean(1)
        gamma = 2 * self.num_steps / (self.num_steps + 1)
        return (gamma * mean).view(-1, *[1] * (weight.dim() - 1))
