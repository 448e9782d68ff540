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


def pooled(spread, shift):
    """A network whose batch norm expects values that are so much wider and so far elsewhere."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        values, norm = network[0](IMAGES), network[1]
        deviation = values.std((0, 2, 3))
        norm.running_mean.copy_(values.mean((0, 2, 3)) + shift * deviation)
        norm.running_var.copy_((spread * deviation).square())
    return network


@pytest.mark.parametrize(("spread", "shift"), [(2, 0), (3, 0), (7, 0), (0.4, 0), (1, 1), (1, -2)])
def test_thresholds_get_gradients_where_statistics_lag_behind(spread, shift, caplog):
    options = {"bits": {"*": 3}, "first_last_bits": None}
    expected = adq_train.quantize(pooled(1, 0), [IMAGES], **options)
    assert not caplog.text
    quantized = adq_train.quantize(pooled(spread, shift), [IMAGES], **options)
    assert "not those of the calibration images (1)" in caplog.text
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(quantized.state_dict()[name], value, msg=name)
    F.cross_entropy(quantized.train()(IMAGES), torch.arange(64) % 4).backward()
    assert all(p.grad.any() for p in quantized.parameters() if p.requires_grad)


def test_a_layer_whose_inputs_become_one_level_is_named(caplog):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    with torch.no_grad():
        network[2].bias.fill_(-100.0)  # a layer that died
    adq_train.quantize(network, [torch.randn(64, 8)], bits={"*": 3}, first_last_bits=None)
    assert "all inputs of 4 are quantized to one level" in caplog.text


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
