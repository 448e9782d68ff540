"""Step functions and their gradients: by kernels where there are some, else in plain PyTorch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adq_train.quantization import gpu_kernels, kernels
from adq_train.quantization.functional import at_least_float32, midpoints, sums_by_index


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
