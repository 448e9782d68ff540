"""DoReFa-Net: weights through a tanh, activations clipped to 0 … 1.

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
    """DoReFa-Net's k-bit activations (section 2.4): quantize_k of the input clipped to [0, 1].

    Nothing is learned and nothing calibrated but the sign. The paper has bounded activation
    functions before it; elsewhere all that exceeds ``clip`` is lost. An input with negative values
    gets the symmetric range of 2^k - 1 levels on [-clip, clip] (this project's choice).

    Args:
        bit_width: k, 2 … 8.
        clip: End of the range, > 0, in the units of the input; 1 is the paper's.

    Raises:
        ValueError: An argument lies outside its range.
    """

    is_uniform = True

    def __init__(self, bit_width: int, *, clip: float = 1.0) -> None:
        super().__init__(bit_width)
        if not 0 < clip < float("inf"):
            raise ValueError(f"clip must be positive and finite, got {clip}")
        self.clip = clip

    def fit(self, values: Tensor, seed: int) -> None:
        """Makes the range signed where a sample of inputs has negative values."""
        self.set_signed(bool(values.min() < 0))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized input of the same shape."""
        return round_ste(self._positions(x)) * (self.clip / self.high)

    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        return (self._positions(x).round() - self.low).to(torch.uint8)

    def levels(self) -> Tensor:
        """The uniform levels: 2^k from 0 to ``clip``, or 2^k - 1 from -``clip`` to ``clip``."""
        return self.codes() * (self.clip / self.high)

    def _positions(self, x: Tensor) -> Tensor:
        """Codes before they are rounded, ``low`` … ``high``."""
        return (at_least_float32(x) / self.clip * self.high).clamp(self.low, self.high)
