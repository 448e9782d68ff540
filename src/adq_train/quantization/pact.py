"""PACT: activations clipped at a learned value (Choi et al. 2018, arXiv 1805.06085)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adq_train.quantization.base import RangedActivationQuantizer
from adq_train.quantization.functional import StraightThrough, at_least_float32, positive


def pact(x: Tensor, alpha: Tensor, low: int, high: int) -> Tensor:
    """PACT's quantizer, equations 1–3 of the paper.

    y = clip(x, 0, α) and ŷ = round(y · high / α) · α / high, with ∂ŷ/∂α = 1 where x ≥ α and 0
    elsewhere, and ∂ŷ/∂x = 1 between the ends of the range. A signed range (this project's
    extension) is the mirror image: clip(x, -α, α) with ∂ŷ/∂α = -1 where x ≤ -α.

    Args:
        x: Any shape.
        alpha: () positive, α, in the units of ``x``.
        low: Smallest code: 0, or -``high`` for a signed range.
        high: Largest code, > 0.

    Returns:
        The shape of ``x``; integers times α / high.
    """
    floor = -alpha if low < 0 else torch.zeros_like(alpha)
    clipped = torch.where(x <= floor, floor, torch.where(x >= alpha, alpha, x))
    value = pact_codes(x, alpha, low, high) * (alpha / high).detach()
    quantized: Tensor = StraightThrough.apply(clipped, value)
    return quantized


@torch.no_grad()
def pact_codes(x: Tensor, alpha: Tensor, low: int, high: int) -> Tensor:
    """The integers of :func:`pact`, ``low`` … ``high``, as floats of the shape of ``x``."""
    return (x / alpha * high).clamp(low, high).round()


class PactActivationQuantizer(RangedActivationQuantizer):
    """Uniform levels between 0 and a learned clip α.

    The paper quantizes inputs that follow a ReLU. An input with negative values gets the signed
    symmetric range -α … α of 2^b - 1 levels instead (this project's choice), so that every network
    runs. α starts at the clip of least squared error on the calibration sample; the paper starts
    high and lets the regularization bring α down. α is used by its magnitude.

    Args:
        bit_width: b, 2 … 8.
        decay: λ ≥ 0 of the paper's L2 regularization of α: λ α is added to the gradient of α.
            The optimizer's own weight decay does not touch parameters of quantizers.

    Raises:
        ValueError: An argument lies outside its range.
    """

    is_uniform = True

    def __init__(self, bit_width: int, *, decay: float = 1e-4) -> None:
        super().__init__(bit_width)
        if not decay >= 0:
            raise ValueError(f"decay must be at least 0, got {decay}")
        self.decay = decay
        self.alpha = nn.Parameter(torch.ones(()))

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises α from a sample of inputs; negative values make the range signed."""
        self.alpha.copy_(self.fitted_step(values) * self.high)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized input of the same shape."""
        return pact(at_least_float32(x), positive(self.alpha), self.low, self.high)

    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        codes = pact_codes(at_least_float32(x), positive(self.alpha), self.low, self.high)
        return (codes - self.low).to(torch.uint8)

    def levels(self) -> Tensor:
        """The uniform levels: 2^b from 0 to α, or 2^b - 1 from -α to α."""
        return self.codes() * (positive(self.alpha.detach()) / self.high)

    @torch.no_grad()
    def regularize(self) -> None:
        """Adds the gradient λ α of the penalty (λ/2) α²."""
        if self.alpha.grad is not None:
            self.alpha.grad.add_(self.alpha, alpha=self.decay)
