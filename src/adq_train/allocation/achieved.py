"""What a prepared model really costs, counted from the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.allocation.budget import Bits, Figures, figures
from adq_train.artifacts import BitAllocation, LayerInfo
from adq_train.errors import UserError
from adq_train.quantization.describe import count_macs, per_example
from adq_train.quantization.layer_weights import used_weight, weight_identity
from adq_train.quantization.prepare import quantized_layers
from adq_train.quantization.watch import run_with_hooks


@torch.no_grad()
def achieved(model: nn.Module, image: Any, pinned: Mapping[str, int], count: int = 1) -> Figures:
    """Figures from the elements, multiply-accumulates and quantizers of a prepared model.

    Counted in evaluation mode without PyTorch's hooks, as it is evaluated.

    Args:
        model: Prepared; left as it was.
        image: (1, C, H, W); or what else the network takes.
        pinned: The layers that stay outside the averages, by name.
        count: Examples in the image, over which what is counted is divided.

    Raises:
        UserError: A quantizer has more levels than its bits can tell apart, or a layer is not
            computed by its own ``forward()``.
    """
    layers = quantized_layers(model)
    infos: dict[str, LayerInfo] = {}
    bits: dict[str, Bits] = {}
    called: set[str] = set()
    name_of: dict[object, str] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        called.add(name)
        own = Bits(layers[name].weight_quantizer.bit_width, layers[name].input_quantizer.bit_width)
        # A weight that is used more than once, by one layer or by several, counts once.
        name = name_of.setdefault(weight_identity(layers[name]), name)
        assert bits.setdefault(name, own) == own, f"{name}: layers with one weight differ in bits"
        old = infos.get(name, LayerInfo(name, 0, 0, 0))
        infos[name] = LayerInfo(
            name,
            used_weight(layers[name]).numel(),
            old.macs + count_macs(layer, inputs[0], output),
            old.num_inputs + inputs[0].numel(),
        )

    run_with_hooks(model, image, {name: partial(record, name) for name in layers})
    for name in layers.keys() - called:
        raise UserError(
            f"model: the quantized layer {name} is not computed in evaluation mode: what holds it "
            "reads its weight, or another layer stands in its place; let it be called"
        )
    for name, layer in layers.items():
        for what, quantizer in (
            ("weights", layer.weight_quantizer),
            ("input", layer.input_quantizer),
        ):
            if len(quantizer.levels()) > 2**quantizer.bit_width:
                raise UserError(
                    f"{name}: the quantizer of its {what} has {len(quantizer.levels())} levels, "
                    f"more than {quantizer.bit_width} bits can tell apart; check the quantizer"
                )
    return figures([per_example(x, count) for x in infos.values()], bits, pinned)


def require_achieved(allocation: BitAllocation, counted: Figures) -> None:
    """Refuses a prepared model that does not cost exactly what the allocation says.

    Raises:
        UserError: Names every figure that differs.
    """
    differ = [
        f"{name} {promised} but the model has {value}"
        for name, value in asdict(counted).items()
        if (promised := getattr(allocation, name)) != value
    ]
    if differ:
        raise UserError(
            f"the allocation says {'; '.join(differ)}; check that the quantizers take the "
            "bit-width that they are given, and delete allocation.json to make it anew"
        )
