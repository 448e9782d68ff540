import copy

import pytest
import torch
from export_helpers import make
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adq_train.quantization.int8_grid import int8_codes, int8_maker, int8_step
from adq_train.quantization.lsq import LsqWeightQuantizer

METHODS = ("adq", "adq_paper", "lsq", "dorefa", "apot", "n2uq")
WEIGHTS = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=16))
def test_every_level_is_near_the_grid(values):
    levels = torch.tensor(values)
    step = int8_step(levels)
    codes = int8_codes(levels, step)
    assert step > 0
    assert codes.abs().max() <= 127
    reach = levels.abs().max()
    # What is smaller than any weight may become 0.
    assert (codes * step - levels).abs().max() <= reach / 127 / 2 * 1.001 + 1e-35
    if reach > 1e-35:
        assert codes.abs().max() >= 64


def test_the_step_is_the_best_of_all_reaches():
    levels = torch.tensor([-1.0, -0.37, 0.21, 0.83])
    errors = {n: float(((levels * n).round() / n - levels).abs().max()) for n in range(64, 128)}
    assert 1 / float(int8_step(levels)) == pytest.approx(min(errors, key=errors.get))


@pytest.mark.parametrize("bits", range(2, 8))
def test_even_levels_are_on_the_grid_already(bits):
    """LSQ's, and N2UQ's and DoReFa's, which are odd multiples of half a step."""
    for levels in (torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * 0.37,
                   (2 * torch.arange(2**bits) / (2**bits - 1) - 1) * 1.9):  # fmt: skip
        step = int8_step(levels)
        torch.testing.assert_close(int8_codes(levels, step) * step, levels, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_integers_times_a_scale_of_their_channel(method, bits):
    plain = make("weight_quantizer", method)(bits)
    quantizer = int8_maker(make("weight_quantizer", method))(bits)
    for x in (plain, quantizer):
        x.calibrate(WEIGHTS)
    quantized: Tensor = quantizer(WEIGHTS)
    integers = quantized / (int8_step(quantizer.levels()) * quantizer.output_scale(WEIGHTS))
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
    assert integers.abs().max() < 127.5
    # The contract of every weight quantizer, to the last bit.
    levels = quantizer.levels()[quantizer.quantize(WEIGHTS).long()]
    assert torch.equal(quantized, levels * quantizer.output_scale(WEIGHTS))
    # The method's codes, at most half a step from its values.
    assert torch.equal(quantizer.quantize(WEIGHTS), plain.quantize(WEIGHTS))
    reach = (plain.levels().abs().max() * plain.output_scale(WEIGHTS)).max()
    assert (quantized - plain(WEIGHTS)).abs().max() <= reach / 127 / 2 * 1.01
    assert isinstance(quantizer, type(plain))
    assert quantizer.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_methods(method):
    found = []
    for maker in (make("weight_quantizer", method), int8_maker(make("weight_quantizer", method))):
        quantizer, weight = maker(3), WEIGHTS.clone().requires_grad_()
        quantizer.calibrate(WEIGHTS)
        quantizer(weight).sum().backward()
        found.append([weight.grad, *(x.grad for x in quantizer.parameters())])
    for own, on_grid in zip(*found, strict=True):
        torch.testing.assert_close(on_grid, own)


def test_copies_and_states_keep_the_grid():
    quantizer = int8_maker(make("weight_quantizer", "adq"))(3)
    quantizer.calibrate(WEIGHTS)
    again = int8_maker(make("weight_quantizer", "adq"))(3)
    again.load_state_dict(quantizer.state_dict())
    for other in (copy.deepcopy(quantizer), again):
        assert torch.equal(other(WEIGHTS), quantizer(WEIGHTS))
    assert not torch.equal(
        quantizer.codebook, quantizer.levels()
    )  # what follows the weights is free


def test_a_maker_of_ones_own_is_taken():
    quantizer = int8_maker(lambda bits: LsqWeightQuantizer(bits))(3)
    assert type(quantizer).__name__ == "LsqWeightQuantizerOnInt8Grid"
