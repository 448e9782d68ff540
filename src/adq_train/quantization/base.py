"""What every quantizer can do; a method is one subclass of one of these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Quantizer(nn.Module, ABC):
    """Maps a tensor to few levels and lets gradients through.

    Args:
        bit_width: Bits of a code, 2 … 8.
    """

    def __init__(self, bit_width: int) -> None:
        super().__init__()
        if not 2 <= bit_width <= 8:
            raise ValueError(f"bit_width must lie in 2 … 8, got {bit_width}")
        self.bit_width = bit_width

    @abstractmethod
    def calibrate(self, values: Tensor, seed: int = 0) -> None:
        """Initialises levels from data, without gradients.

        Args:
            values: The weight tensor, or a sample of activations of any shape.
            seed: For initialisations that draw random numbers.
        """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization: float values of the same shape that are all levels."""

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Codes of the same shape, uint8, indices into :meth:`levels`."""

    @abstractmethod
    def levels(self) -> Tensor:
        """The sorted values (K,), K ≤ 2^bit_width, that codes stand for, before any scale."""

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"bit_width={self.bit_width}"


class WeightQuantizer(Quantizer):
    """A quantizer of weights, which may follow them during training."""

    @torch.no_grad()
    def adapt(self, weight: Tensor, step: int) -> None:
        """Called after optimizer step number ``step`` (from 1); learned quantizers do nothing."""

    @torch.no_grad()
    def regularize(self, weight: Tensor) -> None:
        """Called before each optimizer step; may add to ``weight.grad``."""


class ActivationQuantizer(Quantizer):
    """A quantizer of a layer's input."""


MakeWeightQuantizer = Callable[[int], WeightQuantizer]
MakeActivationQuantizer = Callable[[int], ActivationQuantizer]


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a word that is not in ``allowed``.

    Raises:
        ValueError: Names the field, what it got and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
