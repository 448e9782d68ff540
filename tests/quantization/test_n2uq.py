import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.quantization.n2uq import N2uqActivationQuantizer, N2uqWeightQuantizer

INITIALIZATIONS = ("mse", "quantile")
SAMPLES = {
    "normal": torch.linspace(-2.5, 2.5, 301).pow(3),
    "after a ReLU": torch.linspace(-2, 3, 301).relu(),
    "symmetric": torch.tensor([-1.0, 1.0]),
    "mostly positive": torch.linspace(-0.1, 5, 100),
    "negative": -torch.linspace(0.5, 2, 50),
    "constant": torch.full((5,), 2.0),
    "negative constant": torch.full((5,), -2.0),
    "zeros": torch.zeros(5),
    "single": torch.tensor([3.0]),
    "huge": torch.linspace(-1e30, 2e30, 99),
    "tiny": torch.linspace(-1e-30, 2e-30, 99),
}
each_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())


def calibrated(sample, bit_width=3, **options):
    quantizer = N2uqActivationQuantizer(bit_width, **options)
    quantizer.calibrate(sample)
    return quantizer


@each_sample
@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_calibration_keeps_zero_and_gives_finite_parameters(initialization, sample):
    for bits in range(2, 9):
        quantizer = calibrated(sample, bits, initialization=initialization)
        assert quantizer(torch.zeros(1)) == 0
        assert quantizer.zero_point == 0 or sample.min() < 0

        x = sample.clone().requires_grad_()
        quantizer(x).sum().backward()
        assert torch.isfinite(x.grad).all()
        for name, parameter in quantizer.named_parameters():
            assert torch.isfinite(parameter).all(), name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_forward_gives_the_levels_that_the_codes_stand_for(initialization):
    for sample in SAMPLES.values():
        quantizer = calibrated(sample, initialization=initialization, learn_input_scale=True)
        x = torch.cat([sample, sample * 3, sample.new_zeros(1)])
        for log_input_scale in (0.0, 0.3):
            quantizer.log_input_scale.data.fill_(log_input_scale)
            codes = quantizer.quantize(x)
            assert codes.dtype == torch.uint8
            assert torch.equal(quantizer(x), quantizer.levels()[codes.long()])


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_negative_values_make_the_range_signed(initialization):
    x = torch.randn(1000)
    signed = calibrated(x, initialization=initialization)
    assert 1 <= signed.zero_point <= 6
    assert signed.levels()[0] < 0 < signed.levels()[-1]
    unsigned = calibrated(x.relu(), initialization=initialization)
    assert unsigned.zero_point == 0
    assert unsigned.levels()[0] == 0


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize("value", [-2.0, 0.0, 0.7])
def test_a_constant_is_represented_exactly(initialization, value):
    quantizer = calibrated(torch.full((7,), value), initialization=initialization)
    torch.testing.assert_close(quantizer(torch.full((7,), value)), torch.full((7,), value))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 5), st.booleans())
def test_mse_calibration_is_no_worse_than_any_clip_of_the_grid(seed, bits, signed):
    values = np.random.default_rng(seed).normal(size=200).astype(np.float32) + 0.3
    values = values if signed else abs(values)
    quantizer = calibrated(torch.from_numpy(values), bits)
    low = int(quantizer.zero_point)
    high = 2**bits - 1 - low

    def error(quantized):
        return np.square(quantized - values).mean()

    reach = max(values.max() / high, -values.min() / max(low, 1))
    best = min(
        error(np.clip(np.round(values / step), -low, high) * step)
        for step in reach * np.arange(1, 101) / 100  # the last one clips nothing
    )
    assert error(quantizer(torch.from_numpy(values)).detach().numpy()) <= best * (1 + 1e-4)


def test_quantile_calibration_takes_edges_of_equal_mass():
    x = torch.randn(4001)
    quantizer = calibrated(torch.cat([x, torch.zeros(5000)]), initialization="quantile")
    edges = np.quantile(x.numpy(), np.arange(8) / 7)
    thresholds = (edges[1:] + edges[:-1]) / 2
    np.testing.assert_allclose(quantizer.thresholds(), thresholds, rtol=1e-3, atol=1e-4)


def test_quantile_calibration_gives_codes_of_equal_mass():
    x = 2 + 3 * torch.rand(7000)
    x[:100] = 0  # zeros are left out, and bound the range from below
    quantizer = calibrated(x, initialization="quantile")
    assert quantizer.start == 0
    shares = torch.bincount(quantizer.quantize(x[100:]).long(), minlength=8) / 6900
    # A threshold halves an interval: the outermost codes have half as much as the others. The
    # first interval begins at 0, far below the values, so the first code has nothing.
    assert shares[0] == 0
    assert shares[1:].tolist() == pytest.approx([1.5 / 7, *[1 / 7] * 5, 0.5 / 7], abs=0.01)


def test_quantile_calibration_fits_the_step():
    x = torch.rand(500).square()
    quantizer = calibrated(x, initialization="quantile")
    codes = quantizer.quantize(x).double().numpy()
    fitted, *_ = np.linalg.lstsq(codes[:, None], x.double().numpy(), rcond=None)
    assert quantizer.log_step.exp().item() == pytest.approx(fitted.item(), rel=1e-4)


def test_repeated_values_leave_no_interval_empty():
    x = torch.tensor([1.0] * 90 + [8.0] * 10)
    quantizer = calibrated(x, initialization="quantile")
    # Edges 0, 1, 1, …, 8: the mean width is 8/7, and no interval is less than a hundredth of it.
    widths = quantizer.log_widths.exp()
    assert widths.min().item() == pytest.approx(0.01 * 8 / 7)
    assert (quantizer.thresholds().diff() > 0).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 5), st.booleans())
def test_parameter_gradients_are_those_of_the_ramps(seed, bits, learn_input_scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, generator=generator)
    incoming = torch.randn(4, 6, generator=generator)
    num_steps = 2**bits - 1
    quantizer = calibrated(x, bits, initialization="quantile", learn_input_scale=learn_input_scale)
    quantizer.log_widths.data += 0.3 * torch.randn(num_steps, generator=generator)
    quantizer.start.data -= 0.01  # off the smallest value, where the ramps have a kink
    x.requires_grad_()
    quantizer(x).backward(incoming)

    start, log_widths, log_step, log_input_scale, inputs = (
        p.detach().double().requires_grad_()
        for p in (
            quantizer.start,
            quantizer.log_widths,
            quantizer.log_step,
            quantizer.log_input_scale,
            x,
        )
    )
    widths = log_widths.exp()
    left = start * quantizer.unit.double() + widths.cumsum(0) - widths
    scaled = inputs * log_input_scale.exp()
    ramps = ((scaled[..., None] - left) / widths).clamp(0, 1).sum(-1)
    # The step has the gradient of the rounded output, the others that of the ramps.
    codes = quantizer.quantize(x.detach()) - quantizer.zero_point
    output = log_step.exp().detach() * ramps + log_step.exp() * codes.double()
    output.backward(incoming.double())

    def check(got, expected):
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)

    check(x.grad, inputs.grad)
    check(quantizer.start.grad, start.grad)
    check(quantizer.log_widths.grad, log_widths.grad)
    check(quantizer.log_step.grad, log_step.grad)
    if learn_input_scale:
        check(quantizer.log_input_scale.grad, log_input_scale.grad)
    else:
        assert quantizer.log_input_scale.grad is None


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_the_gradient_reaches_every_parameter(initialization):
    x = torch.randn(50, 8)
    quantizer = calibrated(x, initialization=initialization, learn_input_scale=True)
    quantizer(x).square().sum().backward()
    for name, parameter in quantizer.named_parameters():
        assert (parameter.grad != 0).all(), name


def test_an_unknown_initialization_is_named():
    with pytest.raises(ValueError, match="initialization"):
        N2uqActivationQuantizer(2, initialization="max")


# --- Weights


@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 2, 2), (2, 3, 4)])
def test_weights_are_the_papers_formula_channel_by_channel(shape):
    for bits in range(2, 9):
        weight = torch.randn(shape) * torch.logspace(-2, 1, shape[0]).view(
            -1, *[1] * (len(shape) - 1)
        )
        quantizer = N2uqWeightQuantizer(bits)
        quantizer.calibrate(weight)
        steps = 2**bits - 1
        got = quantizer(weight)
        off = 0
        for channel, quantized in zip(weight.double().numpy(), got.double().numpy(), strict=True):
            # W' = 2^(b-1) / (2^b - 1) · |W| / ‖W‖_1 · W, with |W| the number of weights.
            factor = 2 ** (bits - 1) / steps * channel.size / np.abs(channel).sum()
            unit = np.round((np.clip(factor * channel, -1, 1) + 1) / 2 * steps) * 2 / steps - 1
            off += (np.abs(quantized - unit / factor) > 1e-4 / factor).sum()
        assert off <= 0.02 * weight.numel()  # float32 may put a value on a border elsewhere
        assert off == 0 or bits > 4


def test_weight_levels_are_even_and_without_a_zero():
    for bits in range(2, 9):
        levels = N2uqWeightQuantizer(bits).levels()
        torch.testing.assert_close(levels, torch.linspace(-1, 1, 2**bits), atol=1e-6, rtol=0)
        assert (levels != 0).all()


def test_weights_of_common_distributions_fill_the_levels_about_evenly():
    """What the scale is for: at two bits no level holds less than a sixth of the weights."""
    for weight in (torch.randn(1, 40_000), torch.rand(1, 40_000) - 0.5):
        shares = torch.bincount(N2uqWeightQuantizer(2).quantize(weight).long().flatten()) / 40_000
        assert len(shares) == 4
        assert shares.min() > 1 / 6


def test_the_gradient_of_weights_passes_unchanged_and_not_through_the_scale():
    weight = torch.randn(4, 30, requires_grad=True)
    incoming = torch.randn(4, 30)
    N2uqWeightQuantizer(3)(weight).backward(incoming)
    assert torch.equal(weight.grad, incoming)


def test_a_channel_of_zeros_stays_zero():
    weight = torch.cat([torch.zeros(1, 8), torch.randn(1, 8)])
    quantizer = N2uqWeightQuantizer(2)
    assert quantizer.output_scale(weight)[0] == 0
    assert (quantizer(weight)[0] == 0).all()
