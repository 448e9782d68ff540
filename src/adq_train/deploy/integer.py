"""The integer path: a convolution that multiplies integers only by codebook entries, at the end.

With inputs x = s · q (q integer, 0 for padding) and weights w = c[k], an output is

    Σ w x = s · Σ_k c_k · S_k,        S_k = Σ of the q whose weight has code k,

so the sums over inputs are integer additions, exact in any order, and K multiplications per
output are left. See docs/export.md for what hardware can make of that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adq_train.deploy.layer_tables import LayerTables, uniform_grid


def partial_sums(
    inputs: Tensor,
    codes: Tensor,
    num_levels: int,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Integer sums of inputs by the code of the weight that they meet.

    Args:
        inputs: q, (N, C_in, H, W) of an integer dtype.
        codes: Weight codes, (C_out, C_in / groups, h, w), below ``num_levels``.
        num_levels: K.
        stride: Of the convolution, as the following.
        padding: Zeros around the image.
        dilation: Distance between the taps.
        groups: Groups of channels.

    Returns:
        S, (N, C_out, K, H_out, W_out) int64.
    """
    num_images, out_channels = len(inputs), len(codes)
    padded = F.pad(inputs.long(), (padding[1], padding[1], padding[0], padding[0]))
    height, width = (
        (padded.shape[2 + i] - dilation[i] * (codes.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    taps = [
        padded[
            :,
            :,
            y * dilation[0] : y * dilation[0] + (height - 1) * stride[0] + 1 : stride[0],
            x * dilation[1] : x * dilation[1] + (width - 1) * stride[1] + 1 : stride[1],
        ]
        for y in range(codes.shape[2])
        for x in range(codes.shape[3])
    ]
    # (N, groups, taps of a group's filters, H_out · W_out), in the order of the weights.
    columns = torch.stack(taps, 2).reshape(num_images, groups, -1, height * width)
    chosen = codes.long().reshape(groups, out_channels // groups, 1, -1)
    selects = (chosen == torch.arange(num_levels).view(-1, 1)).long()
    sums = torch.einsum("gokt,ngtp->ngokp", selects, columns)
    return sums.reshape(num_images, out_channels, num_levels, height, width)


def combine(sums: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Outputs from integer sums: scale · Σ_k c_k · S_k + bias, in the dtype of ``codebook``.

    Args:
        sums: S, (N, C_out, K, H_out, W_out).
        codebook: c, (K,).
        scale: () or (C_out,): input step times weight scale.
        bias: (C_out,) or None.

    Returns:
        (N, C_out, H_out, W_out).
    """
    output = torch.einsum("nokhw,k->nohw", sums.to(codebook.dtype), codebook)
    output = output * scale.to(codebook.dtype).reshape(-1, 1, 1)
    return output if bias is None else output + bias.to(codebook.dtype).reshape(-1, 1, 1)


def integer_convolution(
    x: Tensor,
    tables: LayerTables,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """A quantized convolution by integer sums.

    Args:
        x: The layer's float input, (N, C_in, H, W).
        tables: The layer's tables; the levels of its input must be evenly spaced, with a zero.
        bias: (C_out,) or None.
        stride: Of the convolution, as the following.
        padding: Zeros around the image.
        dilation: Distance between the taps.
        groups: Groups of channels.

    Returns:
        (N, C_out, H_out, W_out) float64.

    Raises:
        ValueError: The levels of the input are no multiples of a step.
    """
    grid = uniform_grid(tables.input.levels)
    if grid is None:
        raise ValueError("the levels of the input are not multiples of one step")
    step, zero_point = grid
    inputs = torch.bucketize(x, tables.input.thresholds) - zero_point
    weight = tables.weight
    sums = partial_sums(
        inputs,
        weight.codes,
        len(weight.codebook),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    scale = step.double() if weight.scale is None else step.double() * weight.scale.double()
    return combine(sums, weight.codebook.double(), scale, bias)
