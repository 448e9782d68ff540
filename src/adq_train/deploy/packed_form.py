"""The packed file as one of the formats (formats.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from adq_train.deploy.formats import Source, Written
from adq_train.deploy.packed import open_packed, packed_bytes
from adq_train.errors import UserError
from adq_train.quantization.copies import copied
from adq_train.quantization.layers import QuantLayer
from adq_train.settings.targets import TRUSTED_PREFIXES
from adq_train.states import COUNTER


def write(source: Source) -> Written:
    """The content of the file, and what its parts take."""
    if not source.tables.model:
        require_floats(source.network)
    content, sizes = packed_bytes(source.tables, source.float_type)
    return Written(content, source.network, sizes)


def run(path: Path, source: Source) -> nn.Module:
    """The file read back, into an architecture that holds no value of the network."""
    own = None if source.tables.model else scrambled(source.network)
    return open_packed(path, network=own, trusted=source.trusted or TRUSTED_PREFIXES)[1]


def require_floats(network: nn.Module) -> None:
    """Refuses a network whose outputs may depend on what a packed file does not hold.

    Raises:
        UserError: Names a buffer of integers.
    """
    every = network.named_modules(remove_duplicate=False)
    layers = tuple(f"{name}." for name, module in every if isinstance(module, QuantLayer))
    for name, tensor in network.state_dict().items():
        known = tensor.is_floating_point() or name.endswith(COUNTER) or name.startswith(layers)
        if not known:
            raise UserError(
                f"format: a packed file holds no buffer of {tensor.dtype}, and the network has "
                f"{name}; make it with register_buffer(…, persistent=False), or use format=onnx"
            )


@torch.no_grad()
def scrambled(network: nn.Module) -> nn.Module:
    """A copy in which every value is NaN: what does not come from a file shows."""
    empty = copied(network)
    for tensor in empty.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    return empty
