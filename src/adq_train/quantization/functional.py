"""The arithmetic of quantization as pure functions of tensors.

Levels are always sorted; a value belongs to the level whose index is the number of midpoints
below it, so assignment is a search over K - 1 midpoints and never a K × numel tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adq_train.quantization import gpu_kernels, kernels


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


def staircase(x: Tensor, borders: Tensor, values: Tensor) -> Tensor:
    """The value of the cell that each element lies in; a border belongs to the cell below it.

    Args:
        x: Any shape, float.
        borders: (K - 1,) sorted; a NaN lies above all of them.
        values: (K,), one for each cell.

    Returns:
        The shape and dtype of ``x``.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        opaque: Tensor = _opaque_staircase(x, borders, values)
        return opaque
    if is_channels_last(x):  # elementwise work in memory order
        return staircase(x.permute(0, 2, 3, 1), borders, values).permute(0, 3, 1, 2)
    x = x.contiguous()
    if fast := _fast_path(x):
        y: Tensor = fast.staircase(x, borders, values)
        return y
    cells = torch.bucketize(at_least_float32(x), borders, out_int32=True)
    return values.index_select(0, cells.flatten()).view(x.shape).to(x.dtype)


def _fast_path(x: Tensor) -> ModuleType | None:
    """The kernels that take this tensor, if there are any."""
    if kernels.usable(x):
        return kernels
    return gpu_kernels.module(x) if gpu_kernels.usable(x) else None


def interval_sums(
    x: Tensor, grad: Tensor, edges: Tensor, thresholds: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """What the backward pass of :class:`GeneralizedSTE` reads from its input, in plain PyTorch.

    Args:
        x: Any shape, contiguous.
        grad: Gradient of the output, in the shape of ``x``, contiguous.
        edges: (N + 1,) sorted edges of N intervals.
        thresholds: (N,), each within its interval.
        slopes: (N + 2,) below the first edge, in each interval, above the last edge.

    Returns:
        ``grad`` times the slope where ``x`` lies, in the dtype of ``x``; and sums (3 N + 3,),
        float64: Σ grad over the values above each edge, Σ grad · x over the same, Σ grad above
        each threshold, Σ grad.
    """
    grad = grad.to(x.dtype)
    if x.dtype in (torch.float16, torch.bfloat16):
        grad_x, sums = interval_sums(x.float(), grad.float(), edges, thresholds, slopes)
        return grad_x.to(x.dtype), sums
    if x.is_cuda and len(edges) <= 16:
        return interval_sums_by_mask(x, grad, edges, thresholds, slopes)
    # Edges and thresholds alternate: cell c of both lies in interval (c + 1) // 2, has code c // 2.
    pairs = torch.stack([edges[:-1], thresholds], 1).flatten()
    cells = torch.bucketize(x, torch.cat([pairs, edges[-1:]]), out_int32=True).flatten()
    slots = torch.arange(2 * len(edges), device=x.device)
    grad_x = grad * slopes[(slots + 1) // 2].index_select(0, cells).view(x.shape)
    by_cell, moments = (
        sums_by_index(w.flatten(), cells, len(slots)).double() for w in (grad, grad * x)
    )
    # Cell 2k + 1 is the first above edge k, cell 2k + 2 the first above threshold k.
    above, moment = (y.flip(0).cumsum(0).flip(0) for y in (by_cell, moments))
    return grad_x, torch.cat([above[1::2], moment[1::2], above[2::2], above[:1]])


def interval_sums_by_mask(
    x: Tensor, grad: Tensor, edges: Tensor, thresholds: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """The same edge by edge: what a compiler fuses into one pass, without atomic additions."""

    def over(weights: Tensor, borders: Tensor) -> Tensor:
        parts = [torch.where(x <= b, 0, weights).sum(dtype=torch.float64) for b in borders]
        return torch.stack(parts)

    total = grad.sum(dtype=torch.float64).view(1)
    sums = [over(grad, edges), over(grad * x, edges), over(grad, thresholds), total]
    return grad * slopes[torch.bucketize(x, edges)], torch.cat(sums)


def is_channels_last(x: Tensor) -> bool:
    """Whether a batch of images lies in memory with its channels innermost."""
    last = torch.channels_last
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=last)


# One operator, into which a compiler does not look: it would not see the kernels.
_opaque_staircase = torch.library.custom_op("adq_train::staircase", staircase, mutates_args=())


def _like(x: Tensor) -> Tensor:
    """What the operators return for ``x``, without its values: in its order of memory."""
    return torch.empty_like(x if is_channels_last(x) else x.contiguous())


@_opaque_staircase.register_fake
def _(x: Tensor, borders: Tensor, values: Tensor) -> Tensor:
    return _like(x)


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
        return staircase(weight, midpoints(codebook), codebook)

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
    """A step function with learned thresholds, and N2UQ's generalised straight-through gradient.

    Liu et al. 2022 (arXiv 2111.14826), with levels of any distance. With N intervals, edges
    e_0 = start and e_i = e_(i-1) + a_i, thresholds T_i = (e_(i-1) + e_i) / 2 and levels l_0 … l_N,
    the forward pass is y = l_c with c = #{i : x > T_i}, and the backward pass differentiates the
    continuous function that rises by Δ_i = l_i - l_(i-1) linearly over each [e_(i-1), e_i]. For x
    in interval j that gives

        ∂y/∂x = Δ_j / a_j,        ∂y/∂a_j = −Δ_j (x − e_(j-1)) / a_j²,
        ∂y/∂a_i = −Δ_j / a_j for i < j,        ∂y/∂start = −Δ_j / a_j,

    so the parameters need two sums per interval, Σ g and Σ g (x − e_(j-1)). The derivative to a
    level is exact: Σ g over the values that it stands for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, widths: Tensor, levels: Tensor) -> Tensor:
        """Maps ``x`` to levels, in its own dtype: autocast's next layer would round them to it.

        Args:
            ctx: Autograd's context.
            x: Any shape.
            start: () left edge of the first interval.
            widths: (N,) positive.
            levels: (N + 1,) ascending.
        """
        edges = interval_edges(start, widths)
        thresholds = midpoints(edges)
        ctx.save_for_backward(x, edges, thresholds, widths, levels)
        return staircase(x, thresholds, levels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to x, start, widths and levels."""
        x, edges, thresholds, widths, levels = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        grad_x, *others = step_gradients(
            x, edges, thresholds, widths, levels, grads[0], of_input=wanted
        )
        return grad_x if wanted else None, *others


def step_gradients(
    x: Tensor,
    edges: Tensor,
    thresholds: Tensor,
    widths: Tensor,
    levels: Tensor,
    grad: Tensor,
    of_input: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All gradients of :class:`GeneralizedSTE`.

    Args:
        x: Any shape.
        edges: (N + 1,) sorted.
        thresholds: (N,), each within its interval.
        widths: (N,) positive.
        levels: (N + 1,).
        grad: Of the output, in the shape of ``x``.
        of_input: Whether the first gradient is wanted; if not, it may be any tensor.

    Returns:
        The gradients of x, start (), widths (N,) and levels (N + 1,).
    """
    # A compiler sees one operator; forward on a GPU it sees all, for its pass before this one.
    compiling = torch.compiler.is_compiling()
    at_once = _opaque_step_gradients if compiling else _step_gradients_at_once
    grad_x, row = at_once(x, edges, thresholds, widths, levels, grad, of_input)
    of_widths, of_levels = row[1:].split([len(widths), len(levels)])
    return grad_x, row[0], of_widths, of_levels


def _step_gradients_at_once(
    x: Tensor,
    edges: Tensor,
    thresholds: Tensor,
    widths: Tensor,
    levels: Tensor,
    grad: Tensor,
    of_input: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, or (0,), and those of start, widths and levels in one row (2 N + 2,)."""
    tables = edges, thresholds, widths, levels
    if is_channels_last(x):
        x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
        grad_x, row = _step_gradients_at_once(x, *tables, grad, of_input)
        return grad_x.permute(0, 3, 1, 2) if of_input else grad_x, row
    x, grad = x.contiguous(), grad.contiguous()
    if fast := _fast_path(x):
        grad_x, row = fast.step_gradients(x, grad, *tables, of_input)
    else:
        grad_x, row = _plain_step_gradients(x, grad, *tables)
    return grad_x if of_input else x.new_empty(0), row.to(levels.dtype)


def _plain_step_gradients(
    x: Tensor, grad: Tensor, edges: Tensor, thresholds: Tensor, widths: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, the row in float64."""
    outside, rises = levels.new_zeros(1), levels.diff()
    slopes = torch.cat([outside, rises / widths, outside])
    grad_x, sums = interval_sums(x, grad, edges, thresholds, slopes)
    above, moments, over = sums.view(3, -1)
    in_interval = above[:-1] - above[1:]
    moment = moments[:-1] - moments[1:] - edges[:-1] * in_interval
    pull = rises * in_interval / widths  # −∂L/∂start of each interval
    # Widening an interval shifts every interval after it, as moving the start does.
    later = pull.sum() - pull.cumsum(0)
    grad_widths = -(rises / widths) * (moment / widths) - later
    # ``over`` ends with the sum of all; a level's values lie over one threshold, not the next.
    beyond = torch.cat([over[-1:], over[:-1]])
    grad_levels = beyond - torch.cat([over[:-1], over.new_zeros(1)])
    return grad_x, torch.cat([-pull.sum().view(1), grad_widths, grad_levels])


_opaque_step_gradients = torch.library.custom_op(
    "adq_train::step_gradients", _step_gradients_at_once, mutates_args=()
)


@_opaque_step_gradients.register_fake
def _(
    x: Tensor,
    edges: Tensor,
    thresholds: Tensor,
    widths: Tensor,
    levels: Tensor,
    grad: Tensor,
    of_input: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = _like(x) if of_input else x.new_empty(0)
    return grad_x, levels.new_empty(2 * len(levels))


def interval_edges(start: Tensor, widths: Tensor) -> Tensor:
    """Edges e_0 … e_N (N + 1,) of N intervals with the given start () and widths (N,)."""
    return torch.cat([start.view(1), start + widths.cumsum(0)])


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
