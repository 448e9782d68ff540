"""An adaptive codebook for activations: where it starts, and that all of it learns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.quantization.adq_activations import AdqActivationQuantizer
from adq_train.quantization.n2uq import N2uqActivationQuantizer

SIGNS = pytest.mark.parametrize("signed", [False, True])


def sample(seed=0, signed=True, count=5000):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return values if signed else values.relu()


def calibrated(values, bits=2):
    quantizer = AdqActivationQuantizer(bits)
    quantizer.calibrate(values)
    return quantizer


@SIGNS
def test_it_starts_at_a_codebook_that_k_means_would_keep(signed):
    values = sample(signed=signed)
    quantizer = calibrated(values, 3)
    levels, codes = quantizer.levels(), quantizer.quantize(values).long()
    assert levels[int(quantizer.zero_point)] == 0
    # Every value has the level nearest to it, and every level but 0 the mean of its values.
    nearest = (values[:, None] - levels).abs().argmin(1)
    assert (codes != nearest).float().mean() < 1e-3
    for code, level in enumerate(levels):
        if level != 0:
            torch.testing.assert_close(values[codes == code].mean(), level, rtol=2e-3, atol=1e-3)


@SIGNS
def test_its_error_is_smaller_than_that_of_even_steps(signed):
    values = sample(signed=signed)
    errors = []
    for kind in (AdqActivationQuantizer, N2uqActivationQuantizer):
        quantizer = kind(2)
        quantizer.calibrate(values)
        errors.append((quantizer(values).detach() - values).square().mean().item())
    assert errors[0] < 0.95 * errors[1]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 5), st.booleans())
def test_its_gradients_are_those_of_the_ramps_and_of_the_steps(seed, bits, signed):
    values = sample(seed, signed, 40)
    quantizer = calibrated(values, bits)
    noise = torch.Generator().manual_seed(seed)
    for parameter in (quantizer.log_widths, quantizer.log_rises):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)
    quantizer.start.data -= 0.01  # off the smallest value, where the ramps have a kink
    incoming = torch.randn(40, generator=noise)
    x = values.clone().requires_grad_()
    quantizer(x).backward(incoming)

    start, log_widths, log_rises, inputs = (
        p.detach().double().requires_grad_()
        for p in (quantizer.start, quantizer.log_widths, quantizer.log_rises, values)
    )
    widths, rises = log_widths.exp(), log_rises.exp()
    left = start * quantizer.unit.double() + widths.cumsum(0) - widths
    ramps = ((inputs[:, None] - left) / widths).clamp(0, 1) @ rises.detach()
    steps = (values[:, None] > quantizer.thresholds()).double() @ rises
    below = rises[: int(quantizer.zero_point)].sum()
    ((ramps + steps - below) @ incoming.double()).backward()
    for got, expected in (
        (x.grad, inputs.grad),
        (quantizer.start.grad, start.grad),
        (quantizer.log_widths.grad, log_widths.grad),
        (quantizer.log_rises.grad, log_rises.grad),
    ):
        torch.testing.assert_close(got.double(), expected, rtol=5e-3, atol=5e-3)


@SIGNS
def test_training_brings_it_to_levels_that_it_did_not_start_with(signed):
    # The effect, not the formula: regression onto uneven steps moves thresholds and levels.
    x = torch.linspace(-2, 1 if signed else 0, 2001)
    target = torch.where(x < -1.5, -3.0, torch.where(x < -0.2, -0.5, 0.0))
    x, target = (x, target) if signed else (-x, -target)
    quantizer = calibrated(x)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        loss = (quantizer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert quantizer.levels().abs().max() > 2.5


def test_a_state_dict_gives_the_same_quantizer():
    source, target = calibrated(sample(), 3), AdqActivationQuantizer(3)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(sample(1)), target(sample(1)))
