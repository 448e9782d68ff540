"""Small networks, batches for them, and a trainer of them."""

import math

import torch
from torch import nn

from adq_train.data.base import ALL, ImageData
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.settings.schema import TrainerConfig
from adq_train.training.distributed import ALONE
from adq_train.training.optimizers import Optimizers, parameter_groups
from adq_train.training.trainer import Trainer

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(10, 3, 6, 6, generator=GENERATOR)
TARGETS = torch.randint(4, (10,), generator=GENERATOR)


class Drawn:
    """Batches that are a function of the epoch, as those of the data sets are.

    Args:
        sizes: Of the batches.
        shape: Of an image.
        spoiled: The epoch and the index of a batch that is infinite.
    """

    def __init__(self, *sizes, shape=(4,), spoiled=None):
        self.sizes, self.shape, self.spoiled = sizes or (6, 6, 3), shape, spoiled

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def epoch(self, epoch, batches=ALL, images=ALL):
        generator = torch.Generator().manual_seed(epoch)
        drawn = [torch.randn(size, *self.shape, generator=generator) for size in self.sizes]
        for index in range(len(self))[batches]:
            pixels = drawn[index][images]
            targets = (pixels.flatten(1).sum(1) > 0).long()
            yield pixels * math.inf if self.spoiled == (epoch, index) else pixels, targets


def data_of(batches, counts=()):
    parts = [batches] * 4
    return ImageData("made up", 2, (4, 1, 1), "made up", *parts, class_counts=counts)


def _quantize(model, *indices):
    for index in indices:
        weights, inputs = AdqWeightQuantizer(3, decay=0.5), N2uqActivationQuantizer(3)
        weights.calibrate(model[index].weight)
        inputs.calibrate(torch.randn(50))
        model[index] = quantized(model[index], weights, inputs)
    return model


def network(norm=True, quantize=True):
    """For IMAGES."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    return _quantize(model, *((0, 4) if quantize else ()))


def dense(norm=True, dropout=0.2, quantize=True):
    """For Drawn batches."""
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if norm else nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 8), middle, nn.Dropout(dropout), nn.Linear(8, 2))
    return _quantize(model, *((0, 3) if quantize else ()))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def grouped(model):
    groups = parameter_groups(model, lr=0.1, weight_decay=0.01, quantizer_lr=0.05)
    return torch.optim.SGD(groups, momentum=0.9)


def trainer_of(
    model, *hooks, optimizer=None, batches=None, counts=(), schedule=None, seed=0, ranks=ALONE,
    **settings,
):  # fmt: skip
    """A trainer of a small network, on Drawn batches if on no others.

    Its optimizer is an SGD, or any that is given; settings are those of the section trainer.
    """
    optimizer = optimizer or sgd(model)
    if not isinstance(optimizer, Optimizers):
        optimizer = Optimizers(optimizer, **({"schedule": schedule} if schedule else {}))
    return Trainer(
        model,
        optimizer,
        data_of(batches or Drawn(), counts),
        hooks,
        settings=TrainerConfig(**settings),
        seed=seed,
        ranks=ranks,
    )


def take(trainer, *batches, targets=TARGETS):
    """Steps of a trainer on some images; it counts them as those of an epoch."""
    losses = []
    for images in batches or (IMAGES,):
        loss = trainer.step(images, targets)
        trainer.sums = trainer.sums.plus(len(images), loss)
        losses.append(loss.item())
    return losses


def same(first, second):
    """Whether two networks have the same bits."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
