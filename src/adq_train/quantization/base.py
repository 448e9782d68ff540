"""What every quantizer can do; a method is one subclass of one of these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.quantization.fitting import best_clip
from adq_train.quantization.functional import midpoints

# In a row of fewer weights all of them may be zero by accident.
FEWEST_ZEROS = 8


class Quantizer(nn.Module, ABC):
    """Maps a tensor to few levels and lets gradients through.

    Args:
        bit_width: Bits of a code, 2 … 8.
    """

    what = "values"  # that it quantizes

    def __init__(self, bit_width: int) -> None:
        super().__init__()
        if not 2 <= bit_width <= 8:
            raise ValueError(f"bit_width must lie in 2 … 8, got {bit_width}")
        self.bit_width = bit_width

    @torch.no_grad()
    def calibrate(self, values: Tensor, seed: int = 0) -> None:
        """Initialises levels from data, without gradients.

        Args:
            values: The weight tensor, or a sample of activations of any shape.
            seed: For initialisations that draw random numbers.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        if not torch.isfinite(values).all():
            raise ValueError(f"the {self.what} hold NaN or infinite values")
        self.fit(values.detach(), seed)

    def fit(self, values: Tensor, seed: int) -> None:
        """Initialises levels from finite values; those that need no data do nothing."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization: float values of the same shape that are all levels."""

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Codes of the same shape, uint8, indices into :meth:`levels`."""

    @abstractmethod
    def levels(self) -> Tensor:
        """The sorted values (K,), K ≤ 2^bit_width, that codes stand for, before any scale."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Levels and thresholds move with the network, but are not rounded to 16 bits with it."""

        def kept(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.itemsize >= x.itemsize else x.to(y.device)

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"bit_width={self.bit_width}"


class WeightQuantizer(Quantizer):
    """A quantizer of weights, which may follow them during training.

    ``forward(w)`` equals ``levels()[quantize(w).long()] * output_scale(w)``, bit for bit.
    """

    what = "weights"

    @torch.no_grad()
    def output_scale(self, weight: Tensor) -> Tensor:
        """What levels are multiplied by to stand for ``weight``: positive or 0, without gradient.

        Args:
            weight: (C_out, …).

        Returns:
            A tensor that broadcasts to the shape of ``weight``; 1 for methods without a scale.
        """
        return torch.ones((), device=weight.device)

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        # Inherited, it may do together what the base does to each; this class does otherwise.
        if "adapt" in vars(cls) and "adapt_all" not in vars(cls):
            cls.adapt_all = WeightQuantizer.adapt_all  # type: ignore[method-assign]

    @torch.no_grad()
    def adapt(self, weight: Tensor) -> None:
        """Called after each optimizer step; learned quantizers do nothing."""

    @classmethod
    @torch.no_grad()
    def adapt_all(cls, quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor]) -> None:
        """What :meth:`adapt` does to each of some quantizers of this class.

        Args:
            quantizers: Each once.
            weights: Those that they quantize.
        """
        for quantizer, weight in zip(quantizers, weights, strict=True):
            quantizer.adapt(weight)


class EvenWeightQuantizer(WeightQuantizer):
    """2^b evenly spaced levels on [-1, 1], none of them zero, before the scale; nothing is learned.

    Args:
        bit_width: Bits of a code, 2 … 8.
    """

    base: Tensor

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.num_steps: int = 2**bit_width - 1
        base = 2 * torch.arange(self.num_steps + 1) / self.num_steps - 1
        self.register_buffer("base", base, persistent=False)

    def levels(self) -> Tensor:
        """The 2^b levels on [-1, 1], before the scale."""
        return self.base


class ActivationQuantizer(Quantizer):
    """A quantizer of a layer's input; ``forward(x)`` equals ``levels()[quantize(x).long()]``.

    Attributes:
        is_uniform: Whether levels are integers times a step, and thresholds halfway between them,
            whatever is learned.
    """

    what = "inputs"
    is_uniform = False

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """Where the output steps from one level to the next, (K - 1,), sorted."""
        return midpoints(self.levels())

    @torch.no_grad()
    def regularize(self) -> None:
        """Called before each optimizer step; may add to the gradients of its own parameters."""


class RangedActivationQuantizer(ActivationQuantizer):
    """Codes ``low`` … ``high`` around 0, signed where calibration has seen a negative value.

    The buffer ``zero_point`` is the index of the level 0; it tells a state dict's reader the sign.

    Args:
        bit_width: Bits of a code, 2 … 8.
    """

    zero_point: Tensor

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width)
        self.register_buffer("zero_point", torch.zeros(()))
        self.low, self.high = self.code_range(signed=False)

    def code_range(self, signed: bool) -> tuple[int, int]:
        """Smallest and largest code: 0 … 2^b - 1, or symmetric, ± (2^(b-1) - 1)."""
        reach = 2 ** (self.bit_width - 1) - 1
        return (-reach, reach) if signed else (0, 2**self.bit_width - 1)

    def set_signed(self, signed: bool) -> None:
        """Chooses the signed or the unsigned range."""
        self.low, self.high = self.code_range(signed)
        self.zero_point.fill_(-self.low)

    def fitted_step(self, values: Tensor) -> Tensor:
        """The step () of least squared error on a sample, whose sign chooses the range first."""
        self.set_signed(bool(values.min() < 0))
        return best_clip(values.float().flatten(), -self.low, self.high)

    def codes(self) -> Tensor:
        """All codes, (high - low + 1,), in the dtype and on the device of the quantizer."""
        like = self.zero_point
        return torch.arange(self.low, self.high + 1, device=like.device, dtype=like.dtype)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.set_signed(bool(self.zero_point > 0))


MakeWeightQuantizer = Callable[[int], WeightQuantizer]
MakeActivationQuantizer = Callable[[int], ActivationQuantizer]
Makers = tuple[MakeWeightQuantizer, MakeActivationQuantizer]


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a word that is not in ``allowed``.

    Raises:
        ValueError: Names the field, what it got and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def is_pruned(weights: Tensor) -> bool:
    """Whether zeros among some weights are no accident: a thousandth of them, or a whole row.

    Such a row is a filter that was pruned, or an embedding's padding.
    """
    zero = weights == 0
    rows = zero.flatten(1) if weights.dim() > 1 and weights[0].numel() >= FEWEST_ZEROS else None
    return bool(zero.float().mean() >= 1e-3 or (rows is not None and rows.all(1).any()))
