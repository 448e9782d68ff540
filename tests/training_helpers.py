"""A small quantized network and a batch for it."""

import torch
from torch import nn

from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.n2uq import N2uqActivationQuantizer

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(10, 3, 6, 6, generator=GENERATOR)
TARGETS = torch.randint(4, (10,), generator=GENERATOR)


def network(norm=True, quantize=True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    for index in (0, 4) if quantize else ():
        weights, inputs = AdqWeightQuantizer(3, decay=0.5), N2uqActivationQuantizer(3)
        weights.calibrate(model[index].weight)
        inputs.calibrate(torch.randn(50))
        model[index] = quantized(model[index], weights, inputs)
    return model


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
