import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.quantization.steps import CodebookSTE, GeneralizedSTE, interval_edges

SEEDS = st.integers(0, 2**31)
CASES = (SEEDS, st.integers(1, 8), st.integers(1, 60))


@pytest.mark.parametrize("clip", [False, True])
def test_codebook_ste_passes_the_gradient_through(clip):
    codebook = torch.tensor([-1.0, 0.0, 1.0])
    weight = torch.tensor([[-1.5, -1.0, -0.6], [0.4, 1.0, 1.25]], requires_grad=True)
    incoming = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    quantized = CodebookSTE.apply(weight, codebook, clip)
    quantized.backward(incoming)

    assert quantized.tolist() == [[-1.0, -1.0, -1.0], [0.0, 1.0, 1.0]]
    inside = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]) if clip else torch.ones(2, 3)
    assert torch.equal(weight.grad, incoming * inside)


def surrogate(x, start, widths, levels):
    """What GeneralizedSTE says its backward pass differentiates."""
    left = start + torch.cat([widths.new_zeros(1), widths.cumsum(0)[:-1]])
    ramps = ((x[..., None] - left) / widths).clamp(0, 1)
    return levels[0] + (levels.diff() * ramps).sum(-1)


def code_by_counting(x, start, widths):
    """The number of thresholds below one value."""
    count, left = 0, start
    for width in widths:
        count += x > left + width / 2
        left += width
    return count


def codes_by_counting(x, start, widths):
    return torch.tensor([code_by_counting(v, start.item(), widths.tolist()) for v in x.tolist()])


def random_case(seed, bits, size):
    """Values inside and outside the range of 2^bits - 1 uneven intervals, and a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    widths = 0.1 + draw(2**bits - 1)
    start, levels = draw(()) * 4 - 3, (0.1 + draw(2**bits)).cumsum(0) - 2
    x = start + widths.sum() * (draw(size) * 1.4 - 0.2)
    return [x, start, widths, levels], draw(size) - 0.5


def gradients(function, inputs, incoming):
    leaves = [p.clone().requires_grad_() for p in inputs]
    return torch.autograd.grad(function(*leaves), leaves, incoming)


@settings(deadline=None, max_examples=40)
@given(*CASES)
def test_generalized_ste_takes_the_level_of_the_thresholds_below(seed, bits, size):
    inputs, _ = random_case(seed, bits, size)
    expected = inputs[3][codes_by_counting(*inputs[:3])]
    assert torch.equal(GeneralizedSTE.apply(*inputs), expected)


@settings(deadline=None, max_examples=40)
@given(*CASES)
def test_generalized_ste_differentiates_the_piecewise_linear_function(seed, bits, size):
    inputs, incoming = random_case(seed, bits, size)
    got = gradients(GeneralizedSTE.apply, inputs, incoming)
    expected = gradients(surrogate, inputs, incoming)
    for name, a, b in zip(("x", "start", "widths"), got, expected, strict=False):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@settings(deadline=None, max_examples=40)
@given(*CASES)
def test_generalized_ste_has_the_exact_gradient_of_the_levels(seed, bits, size):
    inputs, incoming = random_case(seed, bits, size)
    got = gradients(GeneralizedSTE.apply, inputs, incoming)[3]
    codes = codes_by_counting(*inputs[:3])
    expected = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, codes, incoming)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_generalized_ste_agrees_with_finite_differences(bits):
    (x, start, widths, levels), _ = random_case(bits, bits, 200)
    distances = (x[:, None] - interval_edges(start, widths)).abs().amin(1)
    x = x[distances > 1e-3]  # no kink within reach of a difference
    incoming = torch.randn(len(x), dtype=torch.float64)
    inputs = [x, start, widths, levels]

    def difference(position, offset):
        def loss(sign):
            moved = list(inputs)
            moved[position] = inputs[position] + sign * offset
            return (surrogate(*moved) * incoming).sum()

        return (loss(1) - loss(-1)) / (2 * offset.sum())

    grads = gradients(GeneralizedSTE.apply, inputs, incoming)
    for position, grad in enumerate(grads[:3]):
        units = 1e-6 * torch.eye(grad.numel(), dtype=torch.float64)
        expected = torch.stack([difference(position, u.view(grad.shape)) for u in units])
        torch.testing.assert_close(grad.flatten(), expected, rtol=1e-5, atol=1e-6)


def test_generalized_ste_at_thresholds_and_edges():
    start, levels = torch.tensor(0.0), torch.tensor([0.0, 2.0, 3.0, 7.0])
    widths = torch.tensor([1.0, 2.0, 4.0])  # thresholds 0.5, 2, 5; edges 0, 1, 3, 7
    at = torch.tensor([0.5, 2.0, 5.0])
    above = torch.nextafter(at, torch.tensor(9.0))
    assert GeneralizedSTE.apply(at, start, widths, levels).tolist() == [0, 2, 3]
    assert GeneralizedSTE.apply(above, start, widths, levels).tolist() == [2, 3, 7]

    edges = torch.tensor([0.0, 1.0, 3.0, 7.0])
    x = torch.cat([edges, torch.nextafter(edges, torch.tensor(9.0))]).requires_grad_()
    GeneralizedSTE.apply(x, start, widths, levels).sum().backward()
    # An interval holds its right edge, not its left one.
    assert x.grad.tolist() == [0, 2, 0.5, 1, 2, 0.5, 1, 0]


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_generalized_ste_at_extreme_scales(factor):
    inputs, incoming = random_case(3, 3, 50)
    inputs = [p * factor for p in inputs]
    expected = gradients(surrogate, inputs, incoming)
    got = gradients(GeneralizedSTE.apply, [p.float() for p in inputs], incoming.float())
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_generalized_ste_keeps_the_shape():
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = GeneralizedSTE.apply(x, torch.tensor(-1.0), torch.ones(3), torch.arange(4.0))
    y.sum().backward()
    assert y.shape == x.grad.shape == (2, 3, 4)


def test_interval_edges():
    edges = interval_edges(torch.tensor(-1.0), torch.tensor([0.5, 2.0]))
    assert edges.tolist() == [-1.0, -0.5, 1.5]
