import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.quantization.lsq import (
    LsqActivationQuantizer,
    LsqWeightQuantizer,
    initial_step,
    lsq,
)


def calibrated(quantizer, values):
    quantizer.calibrate(values)
    return quantizer


def test_gradients_are_equation_3_of_the_paper():
    low, high, num_elements = -4, 3, 20
    step = torch.tensor(0.5, requires_grad=True)
    # v / s: below the range, inside it, above it.
    x = torch.tensor([-3.0, -0.9, 0.1, 0.4, 1.3, 7.0], requires_grad=True)
    by_hand = [-4, -2 + 1.8, 0 - 0.2, 1 - 0.8, 3 - 2.6, 3]
    incoming = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    y = lsq(x, step, low, high, num_elements)
    y.backward(incoming)

    assert y.tolist() == [-2.0, -1.0, 0.0, 0.5, 1.5, 1.5]
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]
    expected = (incoming * torch.tensor(by_hand)).sum() / (num_elements * high) ** 0.5
    torch.testing.assert_close(step.grad, expected)


def equation_3(ratio, low, high):
    """The gradient of one output to the step, by region; ``ratio`` is v / s."""
    if ratio <= low:
        return low
    if ratio >= high:
        return high
    return -ratio + round(ratio)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    size=st.floats(0.01, 2),
)
def test_gradients_are_the_papers_in_float64(seed, bits, signed, size):
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    # Half of the values lie outside of the range, at any number of bits.
    x = size * 2 * high * torch.randn(40, generator=generator, dtype=torch.float64)
    incoming = torch.randn(40, generator=generator, dtype=torch.float64)
    step = torch.tensor(size, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    lsq(x, step, low, high, 40).backward(incoming)

    ratios = (x.detach() / size).tolist()
    by_hand = torch.tensor([equation_3(r, low, high) for r in ratios], dtype=torch.float64)
    torch.testing.assert_close(step.grad, (incoming * by_hand).sum() / (40 * high) ** 0.5)
    inside = torch.tensor([low < r < high for r in ratios])
    torch.testing.assert_close(x.grad, incoming * inside)


@pytest.mark.parametrize("low", [-4, 0])
def test_the_gradient_of_the_step_agrees_with_finite_differences(low):
    """With the rounding errors held as they are, the output is differentiable."""
    high, start = low + 7, 0.3
    x = torch.randn(200, dtype=torch.float64)
    # No kink within reach of a difference.
    x = x[((x / start - low).abs() > 1e-3) & ((x / start - high).abs() > 1e-3)]
    incoming = torch.randn(len(x), dtype=torch.float64)
    clipped = (x / start).clamp(low, high)
    rounding = clipped.round() - clipped

    def loss(step):
        return (((x / step).clamp(low, high) + rounding) * step * incoming).sum()

    step = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    lsq(x, step, low, high, 1).backward(incoming)
    h = 1e-6
    expected = (loss(start + h) - loss(start - h)) / (2 * h) / high**0.5
    torch.testing.assert_close(step.grad, expected, rtol=1e-6, atol=1e-7)


def test_weights_are_signed_and_start_at_the_papers_step():
    for bits in range(2, 9):
        weight = torch.randn(6, 5)
        quantizer = calibrated(LsqWeightQuantizer(bits), weight)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        step = 2 * sum(abs(w) for w in weight.flatten().tolist()) / 30 / high**0.5
        assert quantizer.step.item() == pytest.approx(step, rel=1e-5)
        expected = [step * code for code in range(low, high + 1)]
        assert quantizer.levels().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_inputs_are_signed_where_the_sample_is(signed):
    for bits in range(2, 9):
        sample = torch.randn(100) if signed else torch.rand(100)
        quantizer = calibrated(LsqActivationQuantizer(bits), sample)
        low = -(2 ** (bits - 1)) if signed else 0
        high = low + 2**bits - 1
        torch.testing.assert_close(quantizer.step.detach(), 2 * sample.abs().mean() / high**0.5)
        expected = torch.arange(low, high + 1) * quantizer.step.detach()
        assert torch.equal(quantizer.levels(), expected)
        assert quantizer.levels()[int(quantizer.zero_point)] == 0


def test_the_balance_counts_weights_and_features_of_one_input():
    x = torch.full((4, 6), 100.0)
    for quantizer, num_elements in ((LsqWeightQuantizer(3), 24), (LsqActivationQuantizer(3), 6)):
        quantizer(x).sum().backward()
        # Beyond the range each value adds `high`, times 1 / sqrt(elements · high).
        expected = 24 * quantizer.high / (num_elements * quantizer.high) ** 0.5
        assert quantizer.step.grad.item() == pytest.approx(expected)


def test_a_vector_is_one_input():
    quantizer = LsqActivationQuantizer(3)
    quantizer(torch.full((6,), 100.0)).sum().backward()
    assert quantizer.step.grad.item() == pytest.approx(6 * 7 / (6 * 7) ** 0.5)


def test_zeros_give_a_step_of_one():
    assert initial_step(torch.zeros(4), 7) == 1


def test_learned_steps_need_no_adaptation():
    weight = torch.randn(5, 5, requires_grad=True)
    quantizer = calibrated(LsqWeightQuantizer(3), weight)
    step = quantizer.step.item()
    quantizer.adapt(weight + 1)
    assert quantizer.step.item() == step
