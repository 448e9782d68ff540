"""DoReFa-Net: weights through a tanh, activations clipped at a fixed value.

Zhou et al. 2016 (arXiv 1606.06160).
"""

from __future__ import annotations

import torch
from torch import Tensor

from adq_train.quantization.base import EvenWeightQuantizer, RangedActivationQuantizer
from adq_train.quantization.functional import StraightThrough, at_least_float32, round_ste


def normalized_tanh(weight: Tensor) -> Tensor:
    """tanh(w) / max|tanh(w)|, on [-1, 1]; zeros stay zeros. The maximum is differentiated too.

    Args:
        weight: Any shape.
    """
    squashed = weight.tanh()
    largest = squashed.abs().amax()
    return squashed / torch.where(largest > 0, largest, 1.0)


class DorefaWeightQuantizer(EvenWeightQuantizer):
    """DoReFa-Net's k-bit weights (section 2.3): 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + ½) - 1.

    quantize_k(r) = round((2^k - 1) r) / (2^k - 1) has a straight-through gradient (section 2.2).
    The 2^k levels on [-1, 1] have no zero among them. Quantizing a result once more does not give
    it back, since the tanh bends it again.

    Args:
        bit_width: k, 2 … 8.
        rescale: Whether the result is multiplied by the factor that brings it nearest to the
            weights in the least-squares sense (this project's choice; no gradient passes through
            it). The paper does not: batch normalization takes any factor out again. Yet a network
            that is evaluated before training, or a layer without batch normalization, keeps its
            function only with it.

    Raises:
        ValueError: ``bit_width`` lies outside its range.
    """

    def __init__(self, bit_width: int, *, rescale: bool = True) -> None:
        super().__init__(bit_width)
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized weights of the same shape."""
        x = at_least_float32(x)
        values: Tensor = StraightThrough.apply(normalized_tanh(x), self.base[self._codes(x)])
        return values * self.output_scale(x)

    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        return self._codes(at_least_float32(x)).to(torch.uint8)

    @torch.no_grad()
    def output_scale(self, weight: Tensor) -> Tensor:
        """⟨w, q⟩ / ⟨q, q⟩, (), for weights w and their levels q; 1 without ``rescale``."""
        if not self.rescale:
            return super().output_scale(weight)
        # Flattened in logical order, so that the memory format does not change the sums.
        weights = at_least_float32(weight).flatten()
        values = self.base[self._codes(weights)]
        return ((weights * values).mean() / values.square().mean()).clamp_min(0)

    @torch.no_grad()
    def _codes(self, weight: Tensor) -> Tensor:
        """Indices, int64."""
        return ((normalized_tanh(weight) / 2 + 0.5) * self.num_steps).round().long()


class DorefaActivationQuantizer(RangedActivationQuantizer):
    """DoReFa-Net's k-bit activations (section 2.4): quantize_k of an input clipped to [0, c], / c.

    Nothing is learned. The paper's c is 1, and its networks have bounded activation functions. In a
    network of ReLUs most of an input may lie beyond 1, where no gradient is; so c is by default the
    one of least squared error on the calibration sample (this project's choice). An input with
    negative values gets the symmetric range of 2^k - 1 levels on [-c, c] (ours too).

    Args:
        bit_width: k, 2 … 8.
        clip: c, > 0, in the units of the input; 1 is the paper's. None: from calibration.

    Raises:
        ValueError: An argument lies outside its range.
    """

    is_uniform = True
    end: Tensor

    def __init__(self, bit_width: int, *, clip: float | None = None) -> None:
        super().__init__(bit_width)
        if clip is not None and not 0 < clip < float("inf"):
            raise ValueError(f"clip must be positive and finite, or null, got {clip}")
        self.clip = clip
        end = torch.tensor(1.0 if clip is None else float(clip))
        self.register_buffer("end", end, persistent=clip is None)

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises c where it is not given; negative values make the range signed."""
        if self.clip is None:
            self.end.copy_(self.fitted_step(values) * self.high)
        else:
            self.set_signed(bool(values.min() < 0))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized input of the same shape."""
        return round_ste(self._positions(x)) * (self.end / self.high)

    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        return (self._positions(x).round() - self.low).to(torch.uint8)

    def levels(self) -> Tensor:
        """The uniform levels: 2^k from 0 to c, or 2^k - 1 from -c to c."""
        return self.codes() * (self.end / self.high)

    def _positions(self, x: Tensor) -> Tensor:
        """Codes before they are rounded, ``low`` … ``high``."""
        return (at_least_float32(x) / self.end * self.high).clamp(self.low, self.high)
