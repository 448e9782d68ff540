"""Activations with an adaptive codebook: learned thresholds and learned levels (ours).

The counterpart of ADQ's weights. N2UQ (Liu et al. 2022, arXiv 2111.14826) learns thresholds
alone; here the distances between the levels are learned as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adq_train.quantization.fitting import lloyd_max
from adq_train.quantization.thresholds import SMALLEST_WIDTH, ThresholdQuantizer, uniform_range


class AdqActivationQuantizer(ThresholdQuantizer):
    """A codebook for a layer's input: y = Σ_k Δ_k · 1[x > T_k], less the sum up to the zero.

    Learned: the thresholds T_k (see :class:`~.thresholds.ThresholdQuantizer`) and the rises
    Δ_k > 0, as logarithms. Calibration gives the Lloyd–Max levels of a sample, with one level at
    zero; the intervals begin and end at the levels, so each threshold is halfway between two of
    them, and the gradient passes straight through. Levels of unequal distance are no integers
    times a scale: integer hardware needs a table of 2^n values for them.

    Args:
        bit_width: n.

    Raises:
        ValueError: ``bit_width`` lies outside its range.
    """

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.log_rises = nn.Parameter(torch.zeros(self.num_steps))

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises levels and thresholds from a sample; negative values make it signed."""
        sample = values.float().flatten()
        _, step, zero_point = uniform_range(sample, self.num_steps)
        codes = torch.arange(self.num_steps + 1, device=sample.device)
        levels = lloyd_max(sample, (codes - zero_point) * step, codes == zero_point)
        rises = levels.diff()
        rises = rises.clamp_min(SMALLEST_WIDTH * rises.mean())
        self.zero_point.fill_(zero_point)
        self.log_rises.copy_(rises.log())
        self.set_intervals(self.levels()[0], rises)

    def learned_levels(self) -> Tensor:
        """The levels (2^n,); that of the code ``zero_point`` is 0."""
        levels = torch.cat([self.log_rises.new_zeros(1), self.log_rises.exp().cumsum(0)])
        return levels - levels.index_select(0, self.zero_point.long().view(1))
