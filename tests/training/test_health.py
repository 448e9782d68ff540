"""Flags that say whether a step was finite, and where values that are not begin."""

import math

import pytest
import torch
from torch import nn

from adq_train.training.health import PendingFlags, all_finite, clear_unless, origin


def parameters(*gradients):
    found = [nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(found, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    return found


@pytest.mark.parametrize(
    ("loss", "gradients", "expected"),
    [
        (1.0, [[1.0, 2.0], None, [0.0, -3.0]], True),
        (1.0, [[3e38, 3e38]], True),  # whose norm overflows
        (math.nan, [[1.0, 2.0]], False),
        (math.inf, [[1.0, 2.0]], False),
        (1.0, [[1.0, 2.0], [1.0, math.nan]], False),
        (1.0, [[1.0, math.nan], [1.0, 2.0]], False),
        (1.0, [[-math.inf, 0.0], None], False),
        (1.0, [None], True),
    ],
)
def test_a_step_is_finite(loss, gradients, expected):
    assert bool(all_finite(torch.tensor(loss), parameters(*gradients))) is expected


@pytest.mark.parametrize("finite", [True, False])
def test_gradients_are_cleared(finite):
    found = parameters([1.0, math.nan], None)
    clear_unless(torch.tensor(finite), found)
    assert found[0].grad[0].item() == float(finite)
    assert bool(found[0].grad.isnan().any()) is finite
    assert found[1].grad is None


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class Net(nn.Module):
    """Spoils the values after one of its layers, or the gradients behind it."""

    def __init__(self, spoil):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.spoil = spoil
        if spoil == "weight":
            with torch.no_grad():
                self.b.weight[0, 0] = math.inf

    def forward(self, x):
        x = self.norm(self.a(x))
        x = Spoiled.apply(x) if self.spoil == "gradient" else x
        x = self.b(x)
        return x.log() - math.inf if self.spoil == "end" else x


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("weight", "the output of b (Linear)"),
        ("end", "the model's output"),
        ("gradient", "the gradient of a.weight"),
        ("nothing", "no layer: when the batch was run again, all was finite"),
        ("images", "the images of the batch"),
    ],
)
def test_where_it_begins(spoil, expected):
    torch.manual_seed(0)
    model = Net(spoil)
    images = torch.randn(4, 3)
    if spoil == "images":
        images[0] = math.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert origin(model, images, lambda: model(images).sum().backward()) == expected
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_flags_are_read_in_order_and_late():
    flags = PendingFlags(2)
    images = torch.zeros(1)
    for step, finite in enumerate([True, True, False, False]):
        flags.add(step, torch.tensor(finite), images, images)
        assert flags.failed() is None
    flags.add(4, torch.tensor(True), images, images)
    assert flags.failed().step == 2
    assert [x.step for x in flags.waiting] == [3, 4]
    assert flags.failed(0).step == 3
    assert flags.failed(0) is None
    assert not flags.waiting
