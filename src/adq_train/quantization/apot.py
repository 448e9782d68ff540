"""APoT: levels that are sums of powers of two, under a learned clip.

Li et al. 2020, *Additive Powers-of-Two Quantization* (arXiv 1909.13144). What is said of the
authors' code is that of github.com/yhhhli/APoT_Quantization, commit 13204f1: the files
``CIFAR10/models/quant_layer.py`` and ``ImageNet/models/quant_layer.py``.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from adq_train.quantization.base import RangedActivationQuantizer, WeightQuantizer
from adq_train.quantization.fitting import best_codebook_scale
from adq_train.quantization.functional import assign, at_least_float32, positive
from adq_train.quantization.steps import CodebookSTE


def apot_levels(bit_width: int) -> Tensor:
    """The unsigned APoT level set, equation 5 of the paper with base bit-width k = 2.

    A level is γ Σ p_i over n = b / 2 terms, p_i ∈ {0, 2^-i, 2^-(i+n), 2^-(i+2n)}, i = 0 … n - 1.
    An odd b = 2n + 1 has one more term of one bit, p̃ ∈ {0, 2^-2n}, and
    p_i ∈ {0, 2^-i, 2^-(i+n), 2^-(i+2n+1)}. The factor γ makes the largest level 1.

    Args:
        bit_width: b, 1 … 8; one bit gives {0, 1}.

    Returns:
        (2^b,) sorted, distinct, from 0 to 1, float32.
    """
    n, odd = divmod(bit_width, 2)
    terms = [(0.0, 2.0**-i, 2.0 ** -(i + n), 2.0 ** -(i + 2 * n + odd)) for i in range(n)]
    last = (0.0, 2.0 ** -(2 * n)) if odd else (0.0,)
    sums = sorted(sum(choice) for choice in product(*terms, last))
    return torch.tensor(sums) / sums[-1]


def signed_apot_levels(bit_width: int) -> Tensor:
    """A sign and the unsigned set of one bit less: (2^b - 1,), from -1 to 1.

    Args:
        bit_width: b, 2 … 8; two bits give {-1, 0, 1}.
    """
    magnitudes = apot_levels(bit_width - 1)
    return torch.cat([-magnitudes[1:].flip(0), magnitudes])


def reparameterized_clip(
    x: Tensor, alpha: Tensor, levels: Tensor, clip_gradient: bool = True
) -> Tensor:
    """The paper's reparameterized clipping function (RCF, section 2.3).

    x̂ = α Π(clip(x / α)), with Π the nearest of ``levels`` and a straight-through gradient: ∂x̂/∂x
    is 1 within the range and 0 outside, and ∂x̂/∂α is Π(x / α) - x / α within, the outermost
    level beyond: sign(x), or 0 below a range that begins at 0.

    Args:
        x: Any shape.
        alpha: () positive clip, in the units of ``x``.
        levels: (K,) sorted, within -1 … 1.
        clip_gradient: Without it ∂x̂/∂x is 1 everywhere, and ∂x̂/∂α as above.

    Returns:
        The shape of ``x``; levels times α.
    """
    if not clip_gradient:
        value = reparameterized_clip(x.detach(), alpha, levels)
        return value + (x - x.detach())  # for a finite x exactly the value, with a gradient of 1
    projected: Tensor = CodebookSTE.apply(x / alpha, levels, True)
    return projected * alpha


class ApotWeightQuantizer(WeightQuantizer):
    """Weights normalized to mean 0 and deviation 1 per layer, then APoT levels under a clip α.

    Section 2.4 of the paper: W̃ = (W - μ) / σ is what is quantized, so that the clip sees the same
    distribution in every step. μ and σ follow the weights; no gradient passes through them, as in
    the authors' code for CIFAR-10 (that for ImageNet differentiates both). σ divides by n, theirs
    by n - 1: a factor that α takes in. Without spread (σ = 0) all weights become 0. Since μ and σ
    of a result are others than those of the weights, quantizing it once more may change it.

    Whether weights beyond α get a gradient, the authors answer in three ways: the paper's RCF gives
    them none, their code for ImageNet does the same but at 2 bits ("calibrated gradients"), where
    about a fifth of normal weights lie beyond α, and their code for CIFAR-10 never takes it away.
    The gradient of α is the RCF's in all three.

    α, in units of σ, starts at the clip of least squared error that is not beyond the largest
    weight (this project's choice; the authors start at 3), and is used by its magnitude.

    Args:
        bit_width: b, 2 … 8: a sign and b - 1 bits of magnitude, 2^b - 1 levels.
        rescale: Whether the result is multiplied by σ again (this project's choice); μ stays out.
            The paper does not: batch normalization takes any factor out again. Yet a network that
            is evaluated before training, or a layer without batch normalization, keeps its
            function only with it.
        clip_gradient: Whether weights beyond α get no gradient; None: at more than 2 bits.

    Raises:
        ValueError: ``bit_width`` lies outside its range.
    """

    base: Tensor

    def __init__(
        self, bit_width: int, *, rescale: bool = True, clip_gradient: bool | None = None
    ) -> None:
        super().__init__(bit_width)
        self.rescale = rescale
        self.clip_gradient: bool = bit_width > 2 if clip_gradient is None else clip_gradient
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("base", signed_apot_levels(bit_width), persistent=False)

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises α from a weight tensor."""
        weights = at_least_float32(values)
        mean, deviation = self._statistics(weights)
        normalized = ((weights - mean) / deviation).flatten()
        self.alpha.copy_(best_codebook_scale(normalized, self.base.to(weights.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized weights of the same shape."""
        x = at_least_float32(x)
        mean, deviation = self._statistics(x)
        quantized = reparameterized_clip(
            (x - mean) / deviation, positive(self.alpha), self.base, self.clip_gradient
        )
        return quantized * deviation if self.rescale else quantized

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        x = at_least_float32(x)
        mean, deviation = self._statistics(x)
        return assign((x - mean) / deviation / positive(self.alpha), self.base).to(torch.uint8)

    def levels(self) -> Tensor:
        """The levels from -α to α, of weights in units of their deviation."""
        return self.base * positive(self.alpha.detach())

    @torch.no_grad()
    def output_scale(self, weight: Tensor) -> Tensor:
        """The deviation σ of the layer, (), 1 where it vanishes; 1 without ``rescale``."""
        if not self.rescale:
            return super().output_scale(weight)
        return self._statistics(at_least_float32(weight))[1]

    @torch.no_grad()
    def _statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean () and deviation () of all weights."""
        # Flattened in logical order, so that the memory format does not change the sums; relative
        # to the reach, so that no square overflows or vanishes.
        centered = weight.flatten() - weight.flatten()[0]
        offset = centered.mean()
        centered = centered - offset
        reach = centered.abs().amax()
        reach = torch.where(reach > 0, reach, 1.0)
        deviation = (centered / reach).square().mean().sqrt() * reach
        return weight.flatten()[0] + offset, torch.where(deviation > 0, deviation, 1.0)


class ApotActivationQuantizer(RangedActivationQuantizer):
    """APoT levels between 0 and a learned clip α, with the RCF's gradient.

    An input beyond α gets no gradient, in the paper as in both codes of its authors. An input with
    negative values gets a sign and b - 1 bits of magnitude, as weights do. α starts
    at the clip of least squared error that is not beyond the calibration sample (this project's
    choice), and is used by its magnitude.

    Args:
        bit_width: b, 2 … 8.

    Raises:
        ValueError: ``bit_width`` lies outside its range.
    """

    base: Tensor

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("base", apot_levels(bit_width), persistent=False)

    def set_signed(self, signed: bool) -> None:
        """Chooses the signed or the unsigned level set."""
        super().set_signed(signed)
        make = signed_apot_levels if signed else apot_levels
        self.base = make(self.bit_width).to(self.base)

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises α from a sample of inputs; negative values make the levels signed."""
        sample = at_least_float32(values).flatten()
        self.set_signed(bool(sample.min() < 0))
        self.alpha.copy_(best_codebook_scale(sample, self.base.to(sample.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized input of the same shape."""
        return reparameterized_clip(at_least_float32(x), positive(self.alpha), self.base)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Indices into :meth:`levels`, uint8."""
        return assign(at_least_float32(x) / positive(self.alpha), self.base).to(torch.uint8)

    def levels(self) -> Tensor:
        """The levels: 2^b from 0 to α, or 2^b - 1 from -α to α."""
        return self.base * positive(self.alpha.detach())
