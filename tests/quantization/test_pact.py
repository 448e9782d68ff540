import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.quantization.pact import PactActivationQuantizer, pact


def calibrated(values, bits=3, **options):
    quantizer = PactActivationQuantizer(bits, **options)
    quantizer.calibrate(values)
    return quantizer


def by_hand(x, alpha, bits):
    """Equations 1 and 2 in plain Python, in the paper's own words."""
    y = 0.5 * (abs(x) - abs(x - alpha) + alpha)
    steps = 2**bits - 1
    return round(y * steps / alpha) * alpha / steps


@settings(deadline=None, max_examples=50)
@given(st.floats(0.1, 10), st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.integers(2, 8))
def test_forward_is_equations_1_and_2(alpha, values, bits):
    got = pact(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(alpha, dtype=torch.float64),
        0,
        2**bits - 1,
    )
    expected = [by_hand(x, alpha, bits) for x in values]
    step = alpha / (2**bits - 1)
    for x, a, b in zip(values, got.tolist(), expected, strict=True):
        # A tie may fall either way, by the order of a product and a quotient.
        tie = abs(abs(min(max(x, 0), alpha) / step % 1) - 0.5) < 1e-9
        assert a == pytest.approx(b, abs=1e-9 + step * tie)


def test_gradients_are_equation_3():
    alpha = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(
        [-3.0, -0.1, 0.3, 1.2, 1.999, 2.0, 2.5, 9.0], dtype=torch.float64, requires_grad=True
    )
    incoming = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128], dtype=torch.float64)
    pact(x, alpha, 0, 7).backward(incoming)
    assert x.grad.tolist() == [0, 0, 4, 8, 16, 0, 0, 0]
    assert alpha.grad.item() == 32 + 64 + 128


def test_the_signed_range_mirrors_the_gradients():
    alpha = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([-9.0, -2.0, -1.9, -0.4, 0.3, 1.2, 2.0, 5.0], dtype=torch.float64)
    x.requires_grad_()
    incoming = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128], dtype=torch.float64)
    y = pact(x, alpha, -3, 3)
    y.backward(incoming)
    assert (y * 3 / 2).tolist() == pytest.approx([-3, -3, -3, -1, 0, 2, 3, 3])
    assert x.grad.tolist() == [0, 0, 4, 8, 16, 32, 0, 0]
    assert alpha.grad.item() == 64 + 128 - 1 - 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.booleans())
def test_gradients_are_those_of_the_clipped_function(seed, signed):
    """The straight-through gradient is that of clip(x, low, α), which finite differences see."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(40, generator=generator, dtype=torch.float64)
    incoming = torch.randn(40, generator=generator, dtype=torch.float64)
    value = 1.5
    x = x[((x.abs() - value).abs() > 1e-3) & (x.abs() > 1e-3)]
    incoming = incoming[: len(x)]
    alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    low, high = (-7, 7) if signed else (0, 15)

    def clipped(values, end):
        return (values.clamp(-end if signed else 0, end) * incoming).sum()

    x.requires_grad_()
    pact(x, alpha, low, high).backward(incoming)
    h = 1e-6
    expected = (clipped(x, value + h) - clipped(x, value - h)) / (2 * h)
    torch.testing.assert_close(alpha.grad, expected.detach(), rtol=1e-6, atol=1e-6)
    (grad_x,) = torch.autograd.grad(clipped(x, value), x)
    assert torch.equal(x.grad, grad_x)


@pytest.mark.parametrize("signed", [False, True])
def test_levels_are_even_and_end_at_alpha(signed):
    for bits in range(2, 9):
        x = torch.randn(500) if signed else torch.rand(500)
        quantizer = calibrated(x, bits)
        alpha = quantizer.alpha.item()
        low, count = (-alpha, 2**bits - 1) if signed else (0.0, 2**bits)
        expected = torch.linspace(low, alpha, count)
        torch.testing.assert_close(quantizer.levels(), expected, rtol=1e-5, atol=1e-6)
        assert quantizer.levels()[int(quantizer.zero_point)] == 0


@pytest.mark.parametrize("signed", [False, True])
def test_alpha_starts_at_the_clip_of_least_squared_error(signed):
    x = torch.randn(2000) if signed else torch.randn(2000).relu()
    quantizer = calibrated(x, 3)
    error = (quantizer(x) - x).square().mean().item()
    largest = x.abs().max()
    for share in torch.linspace(0.05, 1, 96):
        other = pact(x, share * largest, quantizer.low, quantizer.high)
        assert error <= (other - x).square().mean().item() * (1 + 1e-3)
    assert 0.3 * largest < quantizer.alpha < 0.95 * largest


def test_decay_is_the_gradient_of_the_penalty():
    quantizer = calibrated(torch.rand(50), decay=0.3)
    quantizer.regularize()
    assert quantizer.alpha.grad is None
    quantizer.alpha.grad = torch.tensor(2.0)
    penalty = 0.3 / 2 * quantizer.alpha.square()
    (expected,) = torch.autograd.grad(penalty, quantizer.alpha)
    quantizer.regularize()
    torch.testing.assert_close(quantizer.alpha.grad, 2 + expected)


@pytest.mark.parametrize("decay", [-1.0, float("nan")])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(ValueError, match="decay must be at least 0"):
        PactActivationQuantizer(3, decay=decay)
