"""A quantized network from its state: surgery without data, then every tensor as it was."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adq_train.artifacts import BitAllocation
from adq_train.quantization.attention import with_new_names
from adq_train.quantization.base import Makers
from adq_train.quantization.layers import same_weight
from adq_train.quantization.prepare import prepare
from adq_train.quantization.target import FLOAT, Target
from adq_train.states import load_state, with_tied


def restored(
    network: nn.Module,
    allocation: BitAllocation,
    make: Makers,
    state: Mapping[str, Tensor],
    target: Target = FLOAT,
) -> nn.Module:
    """Turns a float network into a quantized one with a given state, in place.

    Args:
        network: The float network, with any weights.
        allocation: The bits of its layers.
        make: Map a bit-width to a quantizer of weights and of inputs.
        state: Of the quantized network.
        target: What it was made for.

    Raises:
        KeyError: The state lacks a tensor of the float network.
        RuntimeError: Names or shapes do not fit.
    """
    own, state = network.state_dict(), with_new_names(network, state)
    full = with_tied(own, state)
    load_state(network, {key: full[key] for key in own})
    # Quantizers get their shapes from calibration; the state then replaces the values.
    sample = torch.linspace(-1, 1, 1024)
    names = [name for x in allocation.layers for name in _quantized(network, x.name, state)]
    prepare(network, allocation, *make, dict.fromkeys(names, sample), seed=0)
    target.connect(network)
    load_state(network, state)
    return network


def _quantized(network: nn.Module, name: str, state: Mapping[str, Tensor]) -> list[str]:
    """The layers that were quantized with the layer ``name``, of those that share its weight."""
    same = same_weight(network, name)
    own = [x for x in same if any(key.startswith(f"{x}.input_quantizer.") for key in state)]
    return own or same
