"""Small networks and batches that several metrics are tried on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_train.artifacts import LayerInfo


class Small(nn.Module):
    """Convolutions, one of them called twice, batch norm, an in-place operation, a branch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.shared(x)) + x
        x = torch.tanh(self.shared(x))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


SMALL_LAYERS = (
    LayerInfo("stem", 36, 36 * 36, 36),
    LayerInfo("shared", 144, 2 * 144 * 36, 288),
    LayerInfo("fc", 48, 48, 16),
)


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = Small()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    return net.train()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(n, 1, 6, 6), torch.randint(3, (n,))) for n in (5, 2)]


@pytest.fixture
def layers():
    return SMALL_LAYERS
