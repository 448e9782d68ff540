"""Compares a run's QONNX file with its network integer by integer, in qonnx's own executor.

    python scripts/check_qonnx.py RUN_FOLDER --images 1000

For the first test images it prints, as JSON: how many get another class than from the network that
the file is to be; how many codes of inputs differ from that network's, where both run freely, so
that what rounding has moved over a threshold goes on into the layers behind; and how many codes
differ from ours for the very values that the executor thresholds, and how many of its sums from the
exact ones. The last two are 0 where the file is right.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.deploy import qonnx
from adq_train.deploy.apart import FileHere
from adq_train.deploy.formats import Source
from adq_train.deploy.integers import counted, integer_grid
from adq_train.deploy.packed_layers import PackedLayer
from adq_train.deploy.trained import open_run, table_model, trained_network

TOGETHER = 50


def free_codes(network: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and what every layer's thresholds give, as integers."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: Any) -> Any:
        grid = integer_grid(module.steps.stairs.levels)
        return module.steps.register_forward_pre_hook(
            lambda steps, args: found.update({name: grid.integers[steps.codes(args[0]).long()]})
        )

    layers = {k: m for k, m in network.named_modules() if isinstance(m, PackedLayer)}
    hooks = [note(name, module) for name, module in layers.items()]
    logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, found


def compare(network: nn.Module, file: Any, images: Tensor) -> Counter[str]:
    """Counts what differs on some images."""
    tensors = {
        k: torch.from_numpy(v.copy())
        for k, v in file.graph.tensors(images.numpy(), everything=True).items()
        if v is not None
    }
    inputs = {x.output[0]: x.input[0] for x in file.graph.model.graph.node}
    logits, free = free_codes(network, images)
    counts = Counter(
        images=len(images), other_class=int((logits.argmax(1) != tensors["logits"].argmax(1)).sum())
    )
    for name, expected in free.items():
        layer: Any = network.get_submodule(name)
        stem = name.replace(".", "_")
        codes, values = tensors[f"{stem}_codes"], tensors[inputs[f"{stem}_codes"]]
        stairs = layer.steps.stairs
        if len(counted(stairs, True).values) == tensors[f"{stem}_codes_thresholds"].numel():
            values = values.relu()  # which the thresholds do as well, or which changes nothing
        ours = integer_grid(stairs.levels).integers[torch.bucketize(values, stairs.thresholds)]
        weight = tensors[f"{name}.weight"].double()
        if isinstance(layer.layer, nn.Linear):
            exact = codes.double() @ weight
        else:
            of = layer.layer
            geometry = (of.stride, of.padding, of.dilation, of.groups)
            exact = F.conv2d(codes.double(), weight, None, *geometry)
        counts["codes"] += codes.numel()
        counts["other_codes_running_freely"] += int((codes != expected).sum())
        counts["other_codes_for_the_same_values"] += int((codes != ours).sum())
        counts["sums"] += exact.numel()
        counts["other_sums"] += int((tensors[f"{stem}_sums"].double() != exact).sum())
    return counts


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    run = open_run(options.run)
    network = trained_network(run)
    model = table_model(run, network)
    example = torch.zeros(1, *run.input_format().image_shape)
    source = Source(network, model, example, torch.float32)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.qonnx.onnx")
        written = qonnx.write(source)
        path.write_bytes(written.content)
        file = FileHere(path, "qonnx")
        for batch, _ in run.load_data().test.epoch(0):
            for images in batch.split(TOGETHER):
                if counts["images"] < options.images:
                    counts += compare(
                        written.reference, file, images[: options.images - counts["images"]]
                    )
    names = ("images", "other_class", "codes", "other_codes_running_freely")
    names += ("other_codes_for_the_same_values", "sums", "other_sums")
    print(json.dumps({name: counts[name] for name in names}))


if __name__ == "__main__":
    main()
