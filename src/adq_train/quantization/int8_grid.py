"""Weight levels on an int8 grid, for any method: what integer arithmetic multiplies by."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from adq_train.quantization.base import MakeWeightQuantizer, WeightQuantizer
from adq_train.quantization.functional import StraightThrough

# Symmetric, as runtimes ask for; the smallest reach keeps the error below 1 / 128 of the largest.
LARGEST, SMALLEST = 127, 64


def int8_step(levels: Tensor) -> Tensor:
    """The step of the int8 grid that lies nearest to some levels.

    One of the steps ``max |level| / n``, n = 64 … 127: that whose largest distance from a level to
    the grid is smallest. Levels that are integers times a step, as those of uniform methods, are on
    such a grid already, up to 7 bits; in no case is the distance more than 0.4 % of the largest.

    Args:
        levels: (K,).

    Returns:
        () positive; 1 where all levels vanish.
    """
    largest = levels.abs().amax()
    tiny = LARGEST * torch.finfo(levels.dtype).tiny
    largest = torch.where(largest > tiny, largest, float(LARGEST))
    reaches = torch.arange(LARGEST, SMALLEST - 1, -1, device=levels.device, dtype=levels.dtype)
    places = (levels / largest)[:, None] * reaches
    errors = (places - places.round()).abs().amax(0) / reaches
    return largest / reaches[errors.argmin(0, keepdim=True)].squeeze(0)


def int8_codes(levels: Tensor, step: Tensor) -> Tensor:
    """The grid's integers nearest to the levels, -127 … 127, as floats of the same shape."""
    return (levels / step).round()


@functools.cache
def on_int8_grid(kind: type[WeightQuantizer]) -> type[WeightQuantizer]:
    """A method with its levels on an int8 grid, in ``forward()`` as in ``levels()``.

    Codes and scales are the method's. So is the gradient: it passes straight through the step to
    the grid, to all that the method learns.
    """

    class OnInt8Grid(kind):  # type: ignore[misc, valid-type]
        __doc__ = kind.__doc__

        def levels(self) -> Tensor:
            """The method's levels, each at the nearest point of :func:`int8_step`'s grid."""
            levels = super().levels()
            step = int8_step(levels)
            return int8_codes(levels, step) * step

        def forward(self, x: Tensor) -> Tensor:
            """Fake-quantized weights of the same shape."""
            quantized = super().forward(x)
            with torch.no_grad():
                value = self.levels()[self.quantize(x).long()] * self.output_scale(x)
            on_grid: Tensor = StraightThrough.apply(quantized, value)
            return on_grid

    OnInt8Grid.__name__ = OnInt8Grid.__qualname__ = f"{kind.__name__}OnInt8Grid"
    return OnInt8Grid


def int8_maker(make: MakeWeightQuantizer) -> MakeWeightQuantizer:
    """Makes the same quantizers with their levels on int8 grids."""

    def made(bit_width: int) -> WeightQuantizer:
        quantizer = make(bit_width)
        quantizer.__class__ = on_int8_grid(type(quantizer))
        return quantizer

    return made
