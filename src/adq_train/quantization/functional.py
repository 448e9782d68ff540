"""Small pure functions of tensors that all quantizers use.

Levels are always sorted; a value belongs to the level whose index is the number of midpoints
below it, so assignment is a search over K - 1 midpoints and never a K × numel tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is float16 or bfloat16: quantizers keep their precision in autocast.

    A scalar parameter of float32 alone would not lift a low-precision tensor.
    """
    return x if x.dtype == torch.float64 else x.float()


def positive(x: Tensor) -> Tensor:
    """The magnitude of ``x``, at least the smallest normal number.

    Learned steps and clips pass through it, so that a long optimizer step across zero leaves
    levels in order.
    """
    return x.abs().clamp_min(torch.finfo(x.dtype).tiny)


def midpoints(codebook: Tensor) -> Tensor:
    """The K - 1 borders between the cells of a sorted codebook (K,)."""
    return (codebook[1:] + codebook[:-1]) / 2


def assign(values: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest level for each value, int64; ties go to the lower level.

    Args:
        values: Any shape, float.
        codebook: (K,), sorted.

    Returns:
        The shape of ``values``, in ``0 … K - 1``.
    """
    return torch.bucketize(values.contiguous(), midpoints(codebook))


def sums_by_index(values: Tensor, indices: Tensor, size: int) -> Tensor:
    """The sum of the values of each index.

    Not ``torch.bincount``, which gives the same: on a GPU that waits for the largest index, and has
    no deterministic form.

    Args:
        values: (n,).
        indices: (n,) int32 or int64 in ``0 … size - 1``.
        size: Length of the result.

    Returns:
        (size,) in the dtype of ``values``.
    """
    return values.new_zeros(size).index_add_(0, indices, values)


class StraightThrough(torch.autograd.Function):
    """A value in the place of another; the gradient passes to the one that it replaces.

    Bengio et al. 2013 (arXiv 1308.3432). Unlike ``x + (value - x).detach()`` it gives ``value``
    bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        """Maps two tensors of the same shape to the second one."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The incoming gradient, to the first tensor."""
        return grads[0], None


def round_ste(x: Tensor) -> Tensor:
    """Rounds to the nearest integer; the gradient passes as if it had not."""
    return x + (x.round() - x).detach()


class ScaledGradient(torch.autograd.Function):
    """The same value; the gradient is multiplied by a factor on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Maps a tensor of any shape to itself."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The incoming gradient times the factor."""
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The value of ``x``; its gradient is multiplied by ``factor``."""
    scaled: Tensor = ScaledGradient.apply(x, factor)
    return scaled
