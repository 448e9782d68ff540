"""How many operations of a training step would reach a GPU, counted without one.

    python scripts/count_launches.py               # with Triton's kernels
    python scripts/count_launches.py --plain       # without

ResNet-18, 2 images of 32 × 32, first and last layer at 8 bits, fused SGD and Adam, FiniteWatch; the
second step. A sort or a convolution, which launch several kernels, counts once; see
tests/pretend_gpu.py, which pretends the GPU.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pretend_gpu import gpu, moved
from training_helpers import trainer_of

from adq_train.artifacts import LayerBits
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.prepare import collect_inputs, quantize_layer, swap
from adq_train.training.health import FiniteWatch
from adq_train.training.optimizers import make_optimizers

IMAGES, TARGETS = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])


def network(bits: int) -> torch.nn.Module:
    """The network, float where ``bits`` is 0."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    names = [x.name for x in describe_layers(model, IMAGES[:1])] if bits else []
    inputs = collect_inputs(model, names, [IMAGES], seed=0)
    for name in names:
        width = 8 if name in (names[0], names[-1]) else bits
        makers = AdqWeightQuantizer, N2uqActivationQuantizer
        swap(model, quantize_layer(model, LayerBits(name, width, width), *makers, inputs, 0))
    return model.train()


def count(bits: int, triton: bool) -> tuple[int, int]:
    """Launches and waits of the second step."""
    with gpu(triton=triton) as device:
        model = moved(network(bits))
        sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True)
        adam = partial(torch.optim.Adam, lr=1e-2, fused=True)
        optimizers = make_optimizers(model, 0.01, 1e-4, sgd, adam)
        trainer = trainer_of(model, FiniteWatch(), optimizer=optimizers)
        images, targets = moved(IMAGES), moved(TARGETS)
        trainer.step(images, targets)
        device.launches.clear()
        device.waits.clear()
        trainer.step(images, targets)
        return sum(device.launches.values()), sum(device.waits.values())


def main() -> None:
    """Prints a line for float and for each number of bits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plain", action="store_true", help="without Triton's kernels")
    plain = parser.parse_args().plain
    for bits in (0, 2, 4):
        launches, waits = count(bits, triton=not plain)
        print(f"{bits or 'no'} bits: {launches} operations, {waits} waits", flush=True)


if __name__ == "__main__":
    main()
