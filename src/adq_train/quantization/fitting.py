"""Levels and steps that fit a sample of values: quantiles, Lloyd–Max, the best clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adq_train.quantization import kernels
from adq_train.quantization.functional import assign, midpoints, sums_by_index


def order_statistics(values: Tensor, ranks: Tensor) -> Tensor:
    """The values of these ranks, from 0 for the smallest.

    Args:
        values: (n,), n ≥ 1.
        ranks: (m,) int64 in ``0 … n - 1``.

    Returns:
        (m,) values.
    """
    # Sorting a few thousand values takes less time than counting their digits.
    if len(values) > 2**11 and values.dtype == torch.float32 and kernels.usable(values):
        return kernels.order_statistics(values, ranks)
    return values.sort().values[ranks]


def at_ranks(values: Sequence[Tensor], positions: Tensor) -> Tensor:
    """The values at fractional ranks, interpolated linearly between their neighbours.

    Args:
        values: Several sets (n,), n ≥ 1, of one dtype.
        positions: (sets, m) float64, ranks from 0; those outside ``0 … n - 1`` give the extremes.

    Returns:
        (sets, m) values of the dtype of ``values``.
    """
    last = torch.tensor([[len(x) - 1] for x in values]).to(positions.device, non_blocking=True)
    below = torch.minimum(positions.floor().long().clamp_min(0), last)
    above = torch.minimum(below + 1, last)
    ranks = torch.cat([below, above], 1)
    found = [order_statistics(x, rank) for x, rank in zip(values, ranks, strict=True)]
    low, high = torch.stack(found).chunk(2, 1)
    return torch.lerp(low, high, (positions - below).to(low.dtype))


def quantiles(values: Tensor, fractions: Tensor) -> Tensor:
    """Quantiles with linear interpolation, as ``torch.quantile``, without its limit on the size.

    Args:
        values: (n,), n ≥ 1.
        fractions: (m,) in 0 … 1.

    Returns:
        (m,) values of the dtype of ``values``.
    """
    # float64: a float32 position is off by whole elements beyond 2^24 values.
    return at_ranks([values], fractions.double()[None] * (len(values) - 1))[0]


def cell_statistics(values: Tensor, indices: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """How many values each level got, and their sum.

    Args:
        values: (n,) float.
        indices: (n,) level of each value.
        num_levels: K.

    Returns:
        Counts (K,) and sums (K,), both in the dtype of ``values``.
    """
    # As integers: a float32 that counts stops at 2^24.
    counts = sums_by_index(torch.ones_like(indices), indices, num_levels)
    return counts.to(values.dtype), sums_by_index(values, indices, num_levels)


def lloyd_max(
    values: Tensor, codebook: Tensor, pinned: Tensor, max_iterations: int = 10_000
) -> Tensor:
    """Lloyd–Max iteration (one-dimensional k-means) to its fixed point.

    Each level moves to the mean of its cell until no cell changes; pinned levels and levels of
    empty cells stay. Sorted values and their prefix sums make an iteration O(K log n).

    Args:
        values: (n,) float.
        codebook: (K,) sorted start.
        pinned: (K,) bool, levels that must not move.
        max_iterations: A bound that real weights do not reach.

    Returns:
        (K,) sorted levels.
    """
    ordered = values.double().sort().values
    prefix = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    levels = codebook.double()
    edges = prefix.new_empty(0)
    for iteration in range(max_iterations):
        inner = torch.searchsorted(ordered, midpoints(levels), right=True)
        new_edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(ordered))])
        # Asked now and then: on a GPU each question waits, and at the fixed point nothing moves.
        if iteration % 10 == 9 and torch.equal(edges, new_edges):
            break
        edges = new_edges
        counts = edges.diff()
        means = prefix[edges].diff() / counts.clamp_min(1)
        levels = torch.where(pinned | (counts == 0), levels, means).sort().values
    return levels.to(codebook.dtype)


def best_clip(values: Tensor, low_codes: int, high_codes: int, candidates: int = 100) -> Tensor:
    """The step of a uniform quantizer that makes the squared error smallest.

    Args:
        values: (n,) sample.
        low_codes: Codes below zero (0 for an unsigned range).
        high_codes: Codes above zero.
        candidates: Steps tried, evenly spaced up to the one that clips nothing.

    Returns:
        () positive step, in the dtype of ``values``; 1 / high_codes where all values are zero.
    """
    reach = torch.maximum(values.max() / high_codes, -values.min() / max(low_codes, 1))
    if reach <= 0:
        return values.new_tensor(1 / high_codes)
    # Relative to the reach, so that no square overflows or vanishes.
    relative = values / reach
    steps = torch.arange(1, candidates + 1, device=values.device) / candidates
    errors = torch.stack(
        [((relative / s).round().clamp(-low_codes, high_codes) * s - relative).square().mean()
         for s in steps]
    )  # fmt: skip
    return (steps[errors.argmin()] * reach).to(values.dtype)


def best_codebook_scale(values: Tensor, levels: Tensor, candidates: int = 100) -> Tensor:
    """The factor on a set of levels that makes the squared error smallest.

    Args:
        values: (n,) sample.
        levels: (K,) sorted, the largest one positive.
        candidates: Factors tried, evenly spaced up to the one that clips nothing.

    Returns:
        () positive factor; 1 where no factor is needed, as for values that are all zero.
    """
    reach = values.max() / levels[-1]
    if levels[0] < 0:
        reach = torch.maximum(reach, values.min() / levels[0])
    if reach <= 0:
        return torch.ones_like(reach)
    # Relative to the reach, so that no square overflows or vanishes. Sorted first: a stride
    # through a filter bank can meet one corner of the kernels alone.
    relative = values.sort().values[:: max(1, len(values) // 2**16)] / reach
    factors = torch.arange(1, candidates + 1, device=values.device) / candidates
    errors = torch.stack(
        [(levels[assign(relative / f, levels)] * f - relative).square().mean() for f in factors]
    )
    return factors[errors.argmin()] * reach
