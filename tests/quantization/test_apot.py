import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.quantization.apot import (
    ApotActivationQuantizer,
    ApotWeightQuantizer,
    apot_levels,
    reparameterized_clip,
    signed_apot_levels,
)

BITS = range(2, 9)


def powers_by_bits(bit_width):
    """Exponents of each term, written out: rows are p_0, p_1, …; the last of odd bits is p̃."""
    return {
        1: [[0]],
        2: [[0, 1, 2]],
        3: [[0, 1, 3], [2]],
        4: [[0, 2, 4], [1, 3, 5]],
        5: [[0, 2, 5], [1, 3, 6], [4]],
        6: [[0, 3, 6], [1, 4, 7], [2, 5, 8]],
        7: [[0, 3, 7], [1, 4, 8], [2, 5, 9], [6]],
        8: [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]],
    }[bit_width]


def enumerated(bit_width):
    """All sums of at most one power of two per term, as exact fractions of the largest."""
    sums = {Fraction(0)}
    for exponents in powers_by_bits(bit_width):
        sums |= {s + Fraction(1, 2**e) for s in sums for e in exponents}
    return sorted(s / max(sums) for s in sums)


def test_the_level_set_is_every_sum_of_powers():
    for bits in range(1, 9):
        expected = enumerated(bits)
        assert len(expected) == 2**bits
        levels = apot_levels(bits)
        assert levels.tolist() == pytest.approx([float(level) for level in expected], rel=1e-7)
        assert (levels.diff() > 0).all()


def test_small_level_sets_written_out():
    assert apot_levels(2).tolist() == [0, 0.25, 0.5, 1]
    # 8 p_0 ∈ {0, 1, 4, 8} and 8 p̃ ∈ {0, 2}, by the largest, 10.
    assert (10 * apot_levels(3)).tolist() == pytest.approx([0, 1, 2, 3, 4, 6, 8, 10])
    # 32 p_0 ∈ {0, 2, 8, 32} and 32 p_1 ∈ {0, 1, 4, 16}, by the largest, 48.
    sums = [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48]
    assert (48 * apot_levels(4)).tolist() == pytest.approx(sums)


def test_signed_levels_are_a_sign_and_one_bit_less():
    for bits in BITS:
        magnitudes = [float(level) for level in enumerated(bits - 1)]
        expected = sorted({s * m for s in (-1, 1) for m in magnitudes})
        levels = signed_apot_levels(bits)
        assert len(levels) == 2**bits - 1
        assert levels.tolist() == pytest.approx(expected, rel=1e-6)


def rcf_by_hand(x, alpha, levels):
    """Value, ∂x̂/∂x and ∂x̂/∂α of one element, by the paper's formulas."""
    u = x / alpha
    nearest = min(levels, key=lambda level: abs(min(max(u, levels[0]), 1) - level))
    if u > 1:
        return alpha, 0, 1
    if u < levels[0]:
        return alpha * levels[0], 0, levels[0]
    return alpha * nearest, 1, nearest - u


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(BITS),
    signed=st.booleans(),
    clip=st.floats(0.2, 3),
)
def test_rcf_is_the_papers_in_float64(seed, bits, signed, clip):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(30, generator=generator, dtype=torch.float64)
    incoming = torch.randn(30, generator=generator, dtype=torch.float64)
    levels = (signed_apot_levels if signed else apot_levels)(bits).double()
    alpha = torch.tensor(clip, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    y = reparameterized_clip(x, alpha, levels)
    y.backward(incoming)

    rows = [rcf_by_hand(v, clip, levels.tolist()) for v in x.tolist()]
    values, grads_x, grads_alpha = torch.tensor(rows, dtype=torch.float64).T
    torch.testing.assert_close(y.detach(), values)
    torch.testing.assert_close(x.grad, incoming * grads_x)
    torch.testing.assert_close(alpha.grad, (incoming * grads_alpha).sum())


def test_rcf_with_a_fixed_projection_agrees_with_finite_differences():
    """α (Π + clip(x / α) - x / α as it was) is what the gradient differentiates."""
    x = 2 * torch.randn(50, dtype=torch.float64)
    levels = signed_apot_levels(4).double()
    start = torch.tensor(1.3, dtype=torch.float64)
    x = x[((x / start).abs() - 1).abs() > 1e-3]
    clipped = (x / start).clamp(-1, 1)
    offset = levels[(clipped[:, None] - levels).abs().argmin(1)] - clipped

    def surrogate(alpha):
        return (alpha * (offset + (x / alpha).clamp(-1, 1)) * x).sum()

    alpha = start.clone().requires_grad_()
    (reparameterized_clip(x, alpha, levels) * x).sum().backward()
    h = 1e-6
    expected = (surrogate(start + h) - surrogate(start - h)) / (2 * h)
    torch.testing.assert_close(alpha.grad, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rescale", [False, True])
def test_weights_are_normalised_projected_and_scaled(rescale):
    for bits in BITS:
        weight = 0.03 * torch.randn(6, 4, 3, 3) + 0.01
        quantizer = ApotWeightQuantizer(bits, rescale=rescale)
        quantizer.calibrate(weight)
        alpha = quantizer.alpha.item()
        mean, deviation = weight.double().mean(), weight.double().std(correction=0)
        levels = [alpha * float(s * m) for s in (-1, 1) for m in enumerated(bits - 1)]
        levels = torch.tensor(sorted(levels), dtype=torch.float64)
        normal = (weight.double() - mean) / deviation
        factor = deviation if rescale else 1.0
        expected = levels[(normal[..., None] - levels).abs().argmin(-1)] * factor
        scale = quantizer.output_scale(weight)
        torch.testing.assert_close(scale.double(), torch.as_tensor(factor, dtype=torch.float64))
        codes = quantizer.quantize(weight).long()
        assert torch.equal(quantizer(weight), quantizer.levels()[codes] * scale)
        off = (quantizer(weight).double() - expected).abs() > 1e-5 * alpha * factor
        assert off.float().mean() < 0.01  # float32 may put a value on a border elsewhere
        assert not off.any() or bits > 3


def test_the_gradient_of_weights_passes_within_the_clip_in_units_of_the_output():
    weight = torch.randn(4, 25, dtype=torch.float64)
    mean, deviation = weight.mean(), weight.std(correction=0)
    for rescale, factor in ((True, 1.0), (False, 1 / deviation)):
        quantizer = ApotWeightQuantizer(4, rescale=rescale).double()
        quantizer.alpha.data.fill_(1.0)
        leaf = weight.clone().requires_grad_()
        incoming = torch.randn(4, 25, dtype=torch.float64)
        quantizer(leaf).backward(incoming)
        inside = ((weight - mean) / deviation).abs() <= 1
        assert 10 < inside.sum() < 90
        torch.testing.assert_close(leaf.grad, incoming * inside * factor)


def authors_gradients(weight, alpha, grid, incoming, clipped, factor):
    """Gradients to W and α one weight at a time, by the rules of the authors' published code.

    Their forward pass ends at α Π(…); ``factor`` is what it is multiplied by here.
    """
    mean = sum(weight) / len(weight)
    deviation = math.sqrt(sum((w - mean) ** 2 for w in weight) / len(weight))
    to_weight, to_alpha = [], 0.0
    for w, g in zip(weight, incoming, strict=True):
        u = (w - mean) / deviation / alpha
        sign = math.copysign(1, u)
        beyond = abs(u) > 1
        nearest = min(grid, key=lambda level: abs(min(abs(u), 1) - level))
        to_alpha += g * factor * (sign if beyond else sign * nearest - u)
        to_weight.append(0.0 if beyond and clipped else g * factor / deviation)
    return to_weight, to_alpha


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_gradients_are_those_of_the_authors_code(bits):
    weight = torch.randn(60, dtype=torch.float64) * 0.03 + 0.01
    incoming = torch.randn(60, dtype=torch.float64)
    grid = [float(level) for level in enumerated(bits - 1)]
    deviation = weight.std(correction=0).item()
    for clip, clipped in ((None, bits > 2), (False, False), (True, True)):
        for rescale, factor in ((False, 1.0), (True, deviation)):
            quantizer = ApotWeightQuantizer(bits, rescale=rescale, clip_gradient=clip).double()
            quantizer.alpha.data.fill_(1.2)
            leaf = weight.clone().requires_grad_()
            value = quantizer(leaf)
            value.backward(incoming)
            to_weight, to_alpha = authors_gradients(
                weight.tolist(), 1.2, grid, incoming.tolist(), clipped, factor
            )
            expected = torch.tensor(to_weight, dtype=torch.float64)
            assert (expected == 0).any() == clipped
            torch.testing.assert_close(leaf.grad, expected)
            assert quantizer.alpha.grad.item() == pytest.approx(to_alpha)
            codes = quantizer.quantize(weight).long()
            assert torch.equal(value, quantizer.levels()[codes] * quantizer.output_scale(weight))


def test_no_weight_of_two_bits_stands_still():
    weight = torch.randn(4000, requires_grad=True)
    for bits, stands_still in ((2, (0, 0)), (3, (0.001, 0.2))):
        weight.grad = None
        quantizer = ApotWeightQuantizer(bits)
        quantizer.calibrate(weight)
        quantizer(weight).backward(torch.ones(4000))
        share = (weight.grad == 0).float().mean()
        assert stands_still[0] <= share <= stands_still[1]
    quantizer = ApotWeightQuantizer(2, clip_gradient=True)
    quantizer.calibrate(weight)
    weight.grad = None
    quantizer(weight).backward(torch.ones(4000))
    assert 0.1 < (weight.grad == 0).float().mean() < 0.25  # what it was like


def test_what_lies_beyond_the_clip_can_come_back():
    """One weight beyond α at 2 bits, pulled inwards by SGD, crosses to another level."""
    weight = torch.tensor([2.0, -2.0, 0.3, -0.3]).requires_grad_()
    quantizer = ApotWeightQuantizer(2)
    quantizer.calibrate(weight)
    assert quantizer.quantize(weight).tolist() == [2, 0, 1, 1]
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for _ in range(10):
        optimizer.zero_grad()
        quantizer(weight)[0].backward()
        optimizer.step()
    assert quantizer.quantize(weight)[0] < 2


def test_normalisation_makes_shift_and_scale_irrelevant():
    weight = torch.randn(5, 30, dtype=torch.float64)
    quantizer = ApotWeightQuantizer(4).double()
    quantizer.calibrate(weight)
    expected = quantizer.quantize(weight)
    assert torch.equal(quantizer.quantize(7 * weight + 3), expected)
    torch.testing.assert_close(quantizer(7 * weight + 3), 7 * quantizer(weight))


@pytest.mark.parametrize("signed", [False, True])
def test_alpha_starts_at_the_clip_of_least_squared_error(signed):
    for bits in (2, 3, 4):
        x = torch.randn(2000) if signed else torch.randn(2000).relu()
        quantizer = ApotActivationQuantizer(bits)
        quantizer.calibrate(x)
        error = (quantizer(x) - x).square().mean().item()
        largest = x.abs().max()
        for share in torch.linspace(0.05, 1, 96):
            other = reparameterized_clip(x, share * largest, quantizer.base)
            assert error <= (other - x).square().mean().item() * (1 + 1e-3)
        assert 0.2 * largest < quantizer.alpha <= largest * (1 + 1e-6)


def test_the_clip_of_a_long_sample_sees_every_position():
    # 9 × 2^16 weights: every ninth of them is the same corner of a kernel.
    weight = torch.randn(256, 256, 3, 3)
    weight[..., 0, 0] *= 0.01
    quantizer = ApotWeightQuantizer(4)
    quantizer.calibrate(weight)
    assert quantizer.alpha > 1.5
