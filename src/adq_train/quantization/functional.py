"""The arithmetic of quantization as pure functions of tensors.

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


def quantiles(ordered: Tensor, fractions: Tensor) -> Tensor:
    """Quantiles with linear interpolation, as ``torch.quantile``, without its limit on the size.

    Args:
        ordered: (n,) sorted values, n ≥ 1.
        fractions: (m,) in 0 … 1.

    Returns:
        (m,) values of the dtype of ``ordered``.
    """
    # float64: a float32 position is off by whole elements beyond 2^24 values.
    position = fractions.double() * (len(ordered) - 1)
    below = position.floor().long().clamp(0, len(ordered) - 1)
    above = (below + 1).clamp_max(len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], (position - below).to(ordered.dtype))


@torch.library.custom_op(
    "adq_train::cell_sums",
    mutates_args=(),
    schema="(Tensor cells, Tensor values, int num_cells) -> Tensor",
)
def _opaque_cell_sums(cells: Tensor, values: Tensor, num_cells: int) -> Tensor:
    return torch.bincount(cells, weights=values, minlength=num_cells)


@_opaque_cell_sums.register_fake
def _(cells: Tensor, values: Tensor, num_cells: int) -> Tensor:
    return values.new_empty(num_cells)


def cell_sums(cells: Tensor, values: Tensor, num_cells: int) -> Tensor:
    """The sum of the values in each cell.

    Args:
        cells: (n,) in 0 … num_cells - 1.
        values: (n,) float32 or float64.
        num_cells: m.

    Returns:
        (m,) of the dtype of ``values``.
    """
    # The length of bincount's result depends on data, which would cut a compiled graph in two.
    if torch.compiler.is_compiling():
        sums: Tensor = _opaque_cell_sums(cells, values, num_cells)
        return sums
    return torch.bincount(cells, weights=values, minlength=num_cells)


def cell_statistics(values: Tensor, indices: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """How many values each level got, and their sum.

    Args:
        values: (n,) float.
        indices: (n,) level of each value.
        num_levels: K.

    Returns:
        Counts (K,) and sums (K,), both in the dtype of ``values``.
    """
    counts = torch.bincount(indices, minlength=num_levels).to(values.dtype)
    sums = torch.bincount(indices, weights=values, minlength=num_levels).to(values.dtype)
    return counts, sums


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
    edges = None
    for _ in range(max_iterations):
        inner = torch.searchsorted(ordered, midpoints(levels), right=True)
        new_edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(ordered))])
        if edges is not None and torch.equal(edges, new_edges):
            break
        edges = new_edges
        counts = edges.diff()
        means = prefix[edges].diff() / counts.clamp_min(1)
        levels = torch.where(pinned | (counts == 0), levels, means).sort().values
    return levels.to(codebook.dtype)


class CodebookSTE(torch.autograd.Function):
    """Replaces each weight by its nearest level; gradients pass straight through.

    Bengio et al. 2013 (arXiv 1308.3432); with ``clip`` the gradient is zero for weights beyond
    the outermost levels.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, codebook: Tensor, clip: bool) -> Tensor:
        """Maps a weight of any shape and levels (K,) to quantized weights of the same shape."""
        if clip:
            ctx.save_for_backward((weight >= codebook[0]) & (weight <= codebook[-1]))
        return codebook[assign(weight, codebook)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The incoming gradient, masked where ``clip`` asks for it."""
        saved = ctx.saved_tensors
        return (grads[0] * saved[0] if saved else grads[0]), None, None


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


class GeneralizedSTE(torch.autograd.Function):
    """N2UQ's non-uniform-to-uniform step function with its generalised straight-through gradient.

    Liu et al. 2022 (arXiv 2111.14826). With N intervals, edges e_0 = start and
    e_i = e_(i-1) + widths_i, and thresholds T_i = (e_(i-1) + e_i) / 2, the forward pass is

        y = step · (#{i : x > T_i} − zero_point),

    and the backward pass differentiates the continuous function that rises by ``step`` linearly
    over each [e_(i-1), e_i]. For x in interval j that gives

        ∂y/∂x = step / a_j,        ∂y/∂a_j = −step (x − e_(j-1)) / a_j²,
        ∂y/∂a_i = −step / a_j for i < j,        ∂y/∂start = −step / a_j,

    so the parameters need two sums per interval, Σ g and Σ g (x − e_(j-1)). The derivative to
    ``step`` is exact, since the forward pass is linear in it.

    Edges and thresholds alternate, so one search over both gives a cell k that knows the code,
    k // 2, and the interval, (k + 1) // 2; the backward pass need not search again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, start: Tensor, widths: Tensor, step: Tensor, zero_point: Tensor
    ) -> Tensor:
        """Maps ``x`` to uniform levels.

        Args:
            ctx: Autograd's context.
            x: Any shape.
            start: () left edge of the first interval.
            widths: (N,) positive.
            step: () distance between output levels.
            zero_point: () code whose output is 0.
        """
        x = x.contiguous()  # elementwise work in memory order; a strided search would copy it
        edges = interval_edges(start, widths)
        borders = torch.empty(2 * len(widths) + 1, device=x.device, dtype=edges.dtype)
        borders[::2], borders[1::2] = edges, midpoints(edges)
        cells = torch.bucketize(x, borders, out_int32=True).flatten()
        codes = torch.arange(len(borders) + 1, device=x.device) // 2 - zero_point
        ctx.save_for_backward(x, cells, codes, edges, widths, step)
        return (codes * step).index_select(0, cells).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to x, start, widths and step."""
        x, cells, codes, edges, widths, step = ctx.saved_tensors
        grad = grads[0].flatten()
        outside = step.new_zeros(1)
        # Both halves of an interval have its slope; so do the sums below, cell by cell.
        slopes = torch.cat([outside, (step / widths).repeat_interleave(2), outside])
        grad_x = (grad * slopes.index_select(0, cells)).view_as(x)

        sums = cell_sums(cells, grad, len(codes)).to(x.dtype)
        moments = cell_sums(cells, grad * x.flatten(), len(codes))
        in_interval = sums[1:-1].view(-1, 2).sum(1)
        moment = moments.to(x.dtype)[1:-1].view(-1, 2).sum(1) - edges[:-1] * in_interval
        pull = step * in_interval / widths  # −∂L/∂start of each interval
        # Widening an interval shifts every interval after it, as moving the start does.
        later = pull.sum() - pull.cumsum(0)
        grad_widths = -(step / widths) * (moment / widths) - later
        return grad_x, -pull.sum(), grad_widths, (sums * codes).sum(), None


def interval_edges(start: Tensor, widths: Tensor) -> Tensor:
    """Edges e_0 … e_N (N + 1,) of N intervals with the given start () and widths (N,)."""
    return torch.cat([start.view(1), start + widths.cumsum(0)])


def round_ste(x: Tensor) -> Tensor:
    """Rounds to the nearest integer; the gradient passes as if it had not."""
    return x + (x.round() - x).detach()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The value of ``x``; its gradient is multiplied by ``factor``."""
    scaled = x * factor
    return x.detach() + (scaled - scaled.detach())  # adds an exact zero


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
