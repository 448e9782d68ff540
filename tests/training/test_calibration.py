"""A quantized copy of a float network, whatever state that is in."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adq_train
from adq_train.errors import UserError
from adq_train.training.batch_norm import reestimate_batch_norm

IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def deep():
    torch.manual_seed(0)
    blocks = [
        (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        for i in range(6)
    ]
    return nn.Sequential(*(x for block in blocks for x in block), nn.Flatten(), nn.Linear(512, 4))


def reached(network):
    """The share of values of each layer's input that lie below the last threshold."""
    shares = []

    def look(module, inputs):
        last = module.input_quantizer.thresholds()[-1]
        shares.append(float((inputs[0] <= last).float().mean()))

    for layer in adq_train.quantization.prepare.quantized_layers(network).values():
        layer.register_forward_pre_hook(look)
    network(IMAGES)
    return shares


def test_quantizers_fit_inputs_of_a_network_whose_statistics_were_never_estimated(caplog):
    options = {"bits": {"*": 4}, "first_last_bits": None}
    with caplog.at_level(logging.WARNING):
        stale = adq_train.quantize(deep(), [IMAGES], **options)
    assert "statistics in the float network are not those of the calibration images" in caplog.text
    assert min(reached(stale)) > 0.5
    fresh = deep()
    reestimate_batch_norm(fresh, [IMAGES])
    caplog.clear()
    expected = adq_train.quantize(fresh, [IMAGES], **options)
    assert not caplog.text
    for name, value in expected.state_dict().items():
        assert torch.equal(stale.state_dict()[name], value), name


def test_int8_takes_a_view_with_the_number_of_features():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 4, 3, 4), nn.Linear(16, 2)

        def forward(self, x):
            return self.last(F.relu(self.first(x)).view(-1, 16))

    x = torch.randn(16, 1, 8, 8)
    network = Viewed()
    found = adq_train.quantize(network, [x], (8,), first_last_bits=None, target="int8")
    torch.testing.assert_close(found(x[:3]), network(x[:3]), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (lambda x: torch.flatten(x, 0, 1), r"outputs of shape \(80, 4\) instead of \(16, 20\)"),
        (lambda x: x.view(-1, 6), "shapes cannot be multiplied"),
    ],
)
def test_a_target_that_changes_shapes_is_refused(join, reason):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.last(F.relu(self.first(join(x))))
            return y.view(x.size(0), -1)  # of another tensor: not flatten(y, 1)

    x = torch.randn(16, 5, 6)
    options = {"bits": {"*": 4}, "first_last_bits": None}
    assert adq_train.quantize(Steps(), [x], **options)(x).shape == (16, 20)
    with pytest.raises(UserError, match=reason):
        adq_train.quantize(Steps(), [x], target="int8", **options)
