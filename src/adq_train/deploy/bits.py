"""Codes of two to eight bits, packed without gaps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adq_train.allocation.budget import packed_bytes


def pack(codes: Tensor, bit_width: int) -> Tensor:
    """Writes codes one after the other into a stream of bits, least significant bit first.

    Code i takes the bits i·b … i·b + b - 1 of the stream; bit j of the stream is bit j mod 8 of
    byte j // 8. What is left of the last byte is zero.

    Args:
        codes: Any shape, uint8, each below 2^b; read in row-major order.
        bit_width: b, 1 … 8.

    Returns:
        (⌈n b / 8⌉,) uint8.

    Raises:
        ValueError: A code needs more bits.
    """
    flat = codes.flatten()
    if len(flat) and int(flat.max()) >= 1 << bit_width:
        raise ValueError(f"a code of {int(flat.max())} does not fit into {bit_width} bits")
    stream = np.unpackbits(flat.numpy()[:, None], axis=1, count=bit_width, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(packed: Tensor, bit_width: int, count: int) -> Tensor:
    """The ``count`` codes (count,) uint8 that :func:`pack` wrote.

    Args:
        packed: (⌈count · b / 8⌉,) uint8.
        bit_width: b, 1 … 8.
        count: How many codes there are.

    Raises:
        ValueError: The bytes are too few or too many for them.
    """
    if len(packed) != packed_bytes(count, bit_width):
        raise ValueError(f"{len(packed)} bytes do not hold {count} codes of {bit_width} bits")
    stream = np.unpackbits(packed.numpy(), count=count * bit_width, bitorder="little")
    codes = np.packbits(stream.reshape(count, bit_width), axis=1, bitorder="little")
    return torch.from_numpy(codes[:, 0])
