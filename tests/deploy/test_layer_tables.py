from itertools import product

import pytest
import torch
from export_helpers import CONFIGS, make
from torch import nn

from adq_train.deploy.layer_tables import staircase, tables_of, uniform_grid, weight_table
from adq_train.errors import UserError
from adq_train.quantization.base import ActivationQuantizer, WeightQuantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.lsq import LsqActivationQuantizer, LsqWeightQuantizer


def names(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("name", names("weight_quantizer"))
def test_weights_of_every_method_are_their_tables_bit_for_bit(name):
    for bits in range(2, 9):
        weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits))
        quantizer = make("weight_quantizer", name)(bits)
        quantizer.calibrate(weight)
        table = weight_table(quantizer, weight)
        assert torch.equal(table.weight(), quantizer(weight))
        assert int(table.codes.max()) < len(table.codebook) <= 2**bits
        assert table.bit_width == bits


@pytest.mark.parametrize("level_set", ["symmetric", "full", "no_zero"])
def test_scales_of_channels_are_found(level_set):
    weight = torch.randn(16, 4, 3, 3) * torch.logspace(-4, 4, 16).view(-1, 1, 1, 1)
    weight[3] = 0
    make_quantizer = make("weight_quantizer", "adq", granularity="channel", level_set=level_set)
    quantizer = make_quantizer(3)
    quantizer.calibrate(weight)
    table = weight_table(quantizer, weight)
    assert torch.equal(table.weight(), quantizer(weight))
    known = quantizer.scale.flatten()
    used = known != 1
    torch.testing.assert_close(table.scale[used], known[used], rtol=3e-7, atol=0)


class Scaled(LsqWeightQuantizer):
    """Levels of a whole layer before a scale."""

    def levels(self):
        return super().levels() / self.step.detach()


def test_one_scale_of_a_layer_goes_into_the_codebook():
    weight = torch.randn(4, 9)
    quantizer = Scaled(3)
    quantizer.calibrate(weight)
    table = weight_table(quantizer, weight)
    assert table.scale is None
    assert torch.equal(table.weight(), quantizer(weight))


class NoTable(WeightQuantizer):
    """Depends on the place of a weight."""

    def calibrate(self, values, seed=0):
        pass

    def forward(self, x):
        return x

    def quantize(self, x):
        return torch.zeros_like(x, dtype=torch.uint8)

    def levels(self):
        return torch.ones(4)


class Falling(ActivationQuantizer):
    def calibrate(self, values, seed=0):
        pass

    def forward(self, x):
        return torch.where((x > 0) & (x < 3), 1.0, 0.0)

    def quantize(self, x):
        return self(x).to(torch.uint8)

    def levels(self):
        return torch.tensor([0.0, 1.0])


def test_a_quantizer_without_tables_is_refused_by_the_name_of_its_layer():
    with pytest.raises(UserError, match=r"layer conv7 cannot be exported: .* NoTable"):
        tables_of("conv7", quantized(nn.Linear(3, 2), NoTable(2), LsqActivationQuantizer(2)))
    weights = LsqWeightQuantizer(2)
    with pytest.raises(UserError, match=r"layer fc cannot be exported: .* does not rise"):
        tables_of("fc", quantized(nn.Linear(3, 2), weights, Falling(2)))


@pytest.mark.parametrize("name", names("activation_quantizer"))
def test_staircases_of_every_method_are_exact_to_the_last_bit(name):
    for bits, shift in product(range(2, 9), (0.0, 0.7)):
        sample = torch.randn(2000, generator=torch.Generator().manual_seed(bits)).abs() - shift
        quantizer = make("activation_quantizer", name)(bits)
        quantizer.calibrate(sample)
        stairs = staircase(quantizer)
        # Signed ranges of some methods are symmetric and leave one code unused.
        assert len(stairs.levels) == len(quantizer.levels()) == len(stairs.thresholds) + 1
        assert len(stairs.levels) >= 2**bits - 1
        # The neighbours of each threshold, and random values.
        above = torch.nextafter(stairs.thresholds, torch.tensor(torch.inf))
        below = torch.nextafter(stairs.thresholds, torch.tensor(-torch.inf))
        x = torch.cat([stairs.thresholds, above, below, 3 * torch.randn(5000)])
        with torch.no_grad():
            assert torch.equal(stairs.levels[torch.bucketize(x, stairs.thresholds)], quantizer(x))
            assert torch.equal(quantizer(stairs.thresholds), stairs.levels[:-1])
            assert torch.equal(quantizer(above), stairs.levels[1:])


def test_a_learned_input_scale_goes_into_the_thresholds():
    quantizer = make("activation_quantizer", "n2uq", learn_input_scale=True)(3)
    quantizer.calibrate(torch.rand(100))
    nn.init.constant_(quantizer.log_input_scale, 0.3)
    stairs = staircase(quantizer)
    torch.testing.assert_close(stairs.thresholds * 2.718281828**0.3, quantizer.thresholds())


@pytest.mark.parametrize("zero_point", [0, 3, 7])
def test_grids_are_recognised(zero_point):
    levels = (torch.arange(8) - zero_point) * torch.tensor(0.3)
    step, found = uniform_grid(levels)
    assert (float(step), found) == (pytest.approx(0.3), zero_point)
    levels[5] += 1e-3
    assert uniform_grid(levels) is None
    assert uniform_grid(torch.tensor([1.0, 2.0])) is None
