"""The GPU's fast path in Triton: the step function in one launch, its gradients in two.

Tensors come and go in their own dtype; all is computed in float32. A sum is one of blocks whose
place depends on the number of values alone, and the blocks are added in their order, in float64,
without atomic additions: the same bits in every run.

Imported by :mod:`~.gpu_kernels` alone, since Triton may be missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 15  # so many borders are compared with one by one; among more of them is a search
VALUES = 512  # of a program, forward
FEW_VALUES = 1024  # at a time, backward, among few intervals
MANY = 256, 128  # intervals, of two digits of 16, and values at a time, among many
PROGRAMS = 2048  # at most, backward
SUMMANDS = 1024  # that the last launch adds up at a time, for each kind of sum
WARPS = 4
FACTORS = tl.bfloat16  # of tensor cores' products; the sums are float32

_FEW = tl.constexpr(FEW)


@triton.jit
def _number_below(x, borders, COUNT: tl.constexpr, DIGITS: tl.constexpr):
    """How many of COUNT < 2 ** DIGITS sorted borders lie below x; all of them below a NaN."""
    found = tl.zeros(x.shape, tl.int32)
    for digit in tl.static_range(DIGITS):
        next = found + (1 << (DIGITS - 1 - digit))
        border = tl.load(borders + next - 1, mask=next <= COUNT, other=float("inf"))
        found = tl.where(x <= border, found, next)
    return tl.minimum(found, COUNT)


@triton.jit
def _staircase(
    x_of, y_of, borders, values, size,
    COUNT: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    x = tl.load(x_of + at, mask=here, other=0.0).to(tl.float32)
    if COUNT <= _FEW:
        y = tl.zeros([BLOCK], tl.float32) + tl.load(values)
        for k in tl.static_range(COUNT):
            y = tl.where(x <= tl.load(borders + k), y, tl.load(values + k + 1))
    else:
        y = tl.load(values + _number_below(x, borders, COUNT, DIGITS))
    tl.store(y_of + at, y.to(y_of.dtype.element_ty), mask=here)


@triton.jit
def _few_sums(
    x_of, grad_of, grad_x_of, edges, thresholds, widths, levels, sums, size, blocks,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, WANTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program's row of sums (3 WIDTH), where every interval is looked at in turn.

    First Σ grad within each interval, then beyond them; Σ grad (x - e) within each interval that
    begins at e; Σ grad before them, then that above the threshold within each interval.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inner = tl.zeros([WIDTH], tl.float32)
    moment = tl.zeros([WIDTH], tl.float32)
    upper = tl.zeros([WIDTH], tl.float32)
    for block in range(blocks):
        at = (program * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        here = at < size
        x = tl.load(x_of + at, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grad_of + at, mask=here, other=0.0).to(tl.float32)
        grad_x = tl.zeros([BLOCK], tl.float32)
        edge = tl.load(edges)
        below = x <= edge
        upper += tl.where(column == 0, tl.sum(tl.where(below, grad, 0.0), axis=0), 0.0)
        for k in tl.static_range(COUNT):
            next_edge = tl.load(edges + k + 1)
            below_next = x <= next_edge
            inside = below_next & ~below
            own = tl.where(inside, grad, 0.0)
            inner += tl.where(column == k, tl.sum(own, axis=0), 0.0)
            away = own * tl.where(inside, x - edge, 0.0)
            moment += tl.where(column == k, tl.sum(away, axis=0), 0.0)
            over = tl.where(x <= tl.load(thresholds + k), 0.0, own)
            upper += tl.where(column == k + 1, tl.sum(over, axis=0), 0.0)
            if WANTED:
                rise = tl.load(levels + k + 1) - tl.load(levels + k)
                grad_x += own * tl.div_rn(rise, tl.load(widths + k))
            edge, below = next_edge, below_next
        inner += tl.where(column == COUNT, tl.sum(tl.where(below, 0.0, grad), axis=0), 0.0)
        if WANTED:
            tl.store(grad_x_of + at, grad_x.to(grad_x_of.dtype.element_ty), mask=here)
    row = sums + program * (3 * WIDTH) + column
    tl.store(row, inner)
    tl.store(row + WIDTH, moment)
    tl.store(row + 2 * WIDTH, upper)


@triton.jit
def _rounded(x):
    """The nearest bfloat16, ties to even; written out, as Triton's interpreter cuts bits off."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _histogram(sums, weights, high, low):
    """Adds weights to sums (16, 16) at the places of two digits: a product of one-hot matrices.

    A float32 is the sum of two bfloat16 to 2 ** -17 of it, and tensor cores add in float32.
    """
    first = _rounded(weights)
    rest = _rounded(weights - first.to(tl.float32))
    zero = tl.zeros(high.shape, low.dtype)
    sums = tl.dot(tl.where(high, first.to(low.dtype)[None, :], zero), low, sums)
    return tl.dot(tl.where(high, rest.to(low.dtype)[None, :], zero), low, sums)


@triton.jit
def _many_sums(
    x_of, grad_of, grad_x_of, edges, thresholds, widths, levels, sums, size, blocks,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, WANTED: tl.constexpr, BLOCK: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """The same row for up to 255 intervals: each value's is searched, and sums are histograms."""
    tl.static_assert(WIDTH == 256)
    program = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, 16)
    inner = tl.zeros([16, 16], tl.float32)
    moment = tl.zeros([16, 16], tl.float32)
    upper = tl.zeros([16, 16], tl.float32)
    before = tl.zeros([BLOCK], tl.float32)
    beyond = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        at = (program * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        here = at < size
        x = tl.load(x_of + at, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grad_of + at, mask=here, other=0.0).to(tl.float32)
        passed = _number_below(x, edges, COUNT + 1, 9)
        inside = (passed > 0) & (passed <= COUNT)
        k = tl.where(inside, passed - 1, 0)
        own = tl.where(inside, grad, 0.0)
        high = digit[:, None] == (k // 16)[None, :]
        low = (digit[None, :] == (k % 16)[:, None]).to(FACTOR)
        inner = _histogram(inner, own, high, low)
        away = own * tl.where(inside, x - tl.load(edges + k), 0.0)
        moment = _histogram(moment, away, high, low)
        over = tl.where(x <= tl.load(thresholds + k), 0.0, own)
        upper = _histogram(upper, over, high, low)
        before += tl.where(passed == 0, grad, 0.0)
        beyond += tl.where(passed > COUNT, grad, 0.0)
        if WANTED:
            rise = tl.load(levels + k + 1) - tl.load(levels + k)
            grad_x = own * tl.div_rn(rise, tl.load(widths + k))
            tl.store(grad_x_of + at, grad_x.to(grad_x_of.dtype.element_ty), mask=here)
    row = sums + program * (3 * WIDTH)
    k = digit[:, None] * 16 + digit[None, :]
    tl.store(row + k, tl.where(k == COUNT, tl.sum(beyond, axis=0), inner))
    tl.store(row + WIDTH + k, moment)
    tl.store(row + 2 * WIDTH, tl.sum(before, axis=0))
    tl.store(row + 2 * WIDTH + 1 + k, upper, mask=k < COUNT)


@triton.jit
def _parameter_gradients(
    sums, widths_of, levels, gradients, rows,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients to start, widths and levels (2 COUNT + 2) of rows of sums; see GeneralizedSTE."""
    k = tl.arange(0, WIDTH)
    inner = tl.zeros([CHUNK, WIDTH], tl.float64)
    moment = tl.zeros([CHUNK, WIDTH], tl.float64)
    upper = tl.zeros([CHUNK, WIDTH], tl.float64)
    before = tl.zeros([CHUNK, WIDTH], tl.float64)
    for first in range(0, rows, CHUNK):
        row = first + tl.arange(0, CHUNK)[:, None]
        at = sums + row.to(tl.int64) * (3 * WIDTH) + k[None, :]
        ends = (row < rows) & (k <= COUNT)[None, :]
        intervals = (row < rows) & (k < COUNT)[None, :]
        inner += tl.load(at, mask=ends, other=0.0).to(tl.float64)
        moment += tl.load(at + WIDTH, mask=intervals, other=0.0).to(tl.float64)
        before += tl.load(at + 2 * WIDTH, mask=ends, other=0.0).to(tl.float64)
        upper += tl.load(at + 2 * WIDTH + 1, mask=intervals, other=0.0).to(tl.float64)
    of_cell = tl.sum(inner, axis=0)  # beyond the intervals only the last cell
    # What lies above a threshold belongs to the next cell, and what lies before all to the first.
    grad_levels = of_cell - tl.sum(upper, axis=0) + tl.sum(before, axis=0)
    tl.store(gradients + 1 + COUNT + k, grad_levels.to(tl.float32), mask=k <= COUNT)
    within = k < COUNT
    widths = tl.load(widths_of + k, mask=within, other=1.0).to(tl.float64)
    above = tl.load(levels + k + 1, mask=within, other=0.0).to(tl.float64)
    slopes = (above - tl.load(levels + k, mask=within, other=0.0).to(tl.float64)) / widths
    pull = tl.where(within, slopes * of_cell, 0.0)
    total = tl.sum(pull, axis=0)
    later = total - tl.cumsum(pull, axis=0)
    grad_widths = -slopes * (tl.sum(moment, axis=0) / widths) - later
    tl.store(gradients, (-total).to(tl.float32))
    tl.store(gradients + 1 + k, grad_widths.to(tl.float32), mask=within)


def staircase(x: Tensor, borders: Tensor, values: Tensor) -> Tensor:
    """``values[i]`` for i the number of borders below ``x``; see steps.staircase.

    Args:
        x: Any shape, contiguous; float32, bfloat16 or float16.
        borders: (K - 1,) sorted.
        values: (K,).
    """
    y = torch.empty_like(x)
    count = len(borders)
    with torch.cuda.device_of(x):
        _staircase[(triton.cdiv(x.numel(), VALUES),)](
            x, y, _row(borders), _row(values), x.numel(),
            count, count.bit_length(), VALUES, num_warps=WARPS,
        )  # fmt: skip
    return y


def step_gradients(
    x: Tensor,
    grad: Tensor,
    edges: Tensor,
    thresholds: Tensor,
    widths: Tensor,
    levels: Tensor,
    of_input: bool = True,
) -> tuple[Tensor, Tensor]:
    """All gradients of :class:`~.steps.GeneralizedSTE`.

    Args:
        x: Any shape, contiguous; float32, bfloat16 or float16.
        grad: Of the output, in the shape of ``x``, contiguous, of any of these dtypes.
        edges: (N + 1,) sorted, N ≤ 255.
        thresholds: (N,), each within its interval.
        widths: (N,) positive.
        levels: (N + 1,).
        of_input: Whether the first gradient is wanted.

    Returns:
        That of ``x``, in its shape and dtype, or (0,); those of start (1), widths (N) and levels
        (N + 1) in one row (2 N + 2,), float32.
    """
    count, size = len(widths), x.numel()
    grad_x = torch.empty_like(x) if of_input else x.new_empty(0)
    gradients = torch.empty(2 * count + 2, dtype=torch.float32, device=x.device)
    tables = [_row(t) for t in (edges, thresholds, widths, levels)]
    few = count <= FEW
    width, values = (triton.next_power_of_2(count + 1), FEW_VALUES) if few else MANY
    blocks = triton.cdiv(triton.cdiv(size, values), PROGRAMS)
    programs = triton.cdiv(size, values * blocks)
    sums = torch.empty(programs, 3 * width, dtype=torch.float32, device=x.device)
    given = x, grad, grad_x, *tables, sums, size, blocks, count, width, of_input, values
    with torch.cuda.device_of(x):
        if few:
            _few_sums[(programs,)](*given, num_warps=WARPS)
        else:
            _many_sums[(programs,)](*given, FACTORS, num_warps=WARPS)
        _parameter_gradients[(1,)](
            sums, *tables[2:], gradients, programs,
            count, width, SUMMANDS // width, num_warps=WARPS,
        )  # fmt: skip
    return grad_x, gradients


def _row(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()
