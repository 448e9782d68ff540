"""What every quantizer of the config groups promises, on drawn and on degenerate tensors."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

CONFIGS = Path(__file__).parents[2] / "configs"
BITS = range(2, 9)
CHOICES = [
    (group, file.stem)
    for group in ("weight_quantizer", "activation_quantizer")
    for file in sorted((CONFIGS / group).glob("*.yaml"))
]
WEIGHTS = [name for group, name in CHOICES if group == "weight_quantizer"]
each_choice = pytest.mark.parametrize(("group", "name"), CHOICES)
each_weight = pytest.mark.parametrize("name", WEIGHTS)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])

# Quantizing a result again gives it back. The others measure their weights anew in every call
# (a tanh, a deviation, a mean magnitude), so that a result is quantized by another scale; of
# N2UQ's activations, thresholds and levels are learned apart from each other.
IDEMPOTENT = {
    ("weight_quantizer", "adq"),
    ("weight_quantizer", "lsq"),
    ("activation_quantizer", "lsq"),
    ("activation_quantizer", "pact"),
    ("activation_quantizer", "apot"),
    ("activation_quantizer", "dorefa"),
}

DEGENERATE = {
    "constant": torch.full((4, 6), 0.7),
    "negative constant": torch.full((4, 6), -0.7),
    "zeros": torch.zeros(4, 6),
    "one-sided": torch.linspace(0.1, 2, 24).view(4, 6),
    "negative": -torch.linspace(0.1, 2, 24).view(4, 6),
    "one channel of zeros": torch.cat([torch.zeros(1, 6), torch.linspace(-1, 1, 18).view(3, 6)]),
    "huge": torch.linspace(-1e30, 0.6e30, 24).view(4, 6),
    "tiny": torch.linspace(-1e-30, 0.6e-30, 24).view(4, 6),
    "single": torch.tensor([[-3.0]]),
}


def make(group, name, bits):
    return instantiate(OmegaConf.load(CONFIGS / group / f"{name}.yaml"))(bits)


def calibrated(group, name, bits, values):
    quantizer = make(group, name, bits)
    quantizer.calibrate(values)
    return quantizer


def drawn(seed, shape, factor=1.0, signed=True):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * factor
    return values if signed else values.relu()


def normalized(group, name, quantizer, x):
    """What is compared with the levels, by each method's own definition, in float64."""
    x = x.double()
    if group == "activation_quantizer" or name == "lsq":
        return x
    if name == "apot":
        return (x - x.mean()) / (x.std(correction=0) if x.min() < x.max() else 1)
    if name == "dorefa":
        return x.tanh() / x.tanh().abs().max() if x.any() else x
    scale = quantizer.output_scale(x.float()).double()
    return x / torch.where(scale > 0, scale, 1.0)


def output_scale(group, quantizer, x):
    return quantizer.output_scale(x) if group == "weight_quantizer" else torch.ones(())


def check_contract(group, quantizer, x):
    """Levels are sorted and few, codes are theirs, and forward is what the codes stand for."""
    levels, codes = quantizer.levels(), quantizer.quantize(x)
    assert 2 <= len(levels) <= 2**quantizer.bit_width
    assert torch.isfinite(levels).all()
    assert (levels.diff() >= 0).all()
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert int(codes.max()) < len(levels)
    scale = output_scale(group, quantizer, x)
    assert (scale >= 0).all()
    assert not scale.requires_grad
    expected = levels[codes.long()] * scale
    assert expected.shape == x.shape
    assert torch.equal(quantizer(x), expected)


def test_every_choice_is_known_here():
    assert len(CHOICES) >= 10
    assert set(CHOICES) >= IDEMPOTENT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_choice
def test_a_cast_of_the_network_leaves_it_in_float32(group, name, dtype):
    x = drawn(0, (4, 6))
    quantizer = calibrated(group, name, 2, x)
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    torch.nn.Sequential(quantizer).to(dtype)
    for name, value in quantizer.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name])
    check_contract(group, quantizer, x)


shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
draws = given(
    seed=st.integers(0, 2**31),
    shape=shapes,
    bits=st.sampled_from(BITS),
    factor=st.sampled_from([1e-30, 1e-3, 0.05, 1.0, 1e3, 1e30]),
    signed=st.booleans(),
)


@each_choice
@settings(deadline=None, max_examples=15)
@draws
def test_forward_gives_the_levels_that_the_codes_stand_for(
    group, name, seed, shape, bits, factor, signed
):
    x = drawn(seed, shape, factor, signed)
    check_contract(group, calibrated(group, name, bits, x), x)


@each_choice
def test_every_bit_width_keeps_the_contract_and_the_order(group, name):
    for bits in BITS:
        x = drawn(bits, (6, 40))
        quantizer = calibrated(group, name, bits, x)
        check_contract(group, quantizer, 1.5 * x)
        ordered = x[0].sort().values.view(1, -1)  # of one channel, whose scale they share
        assert (quantizer.quantize(ordered).int().diff() >= 0).all()
        assert (quantizer(ordered).diff() >= 0).all()
        # What was calibrated on a wide sample uses nearly every level at a few bits.
        if bits <= 3 and name != "dorefa":
            used = quantizer.quantize(drawn(1, (50, 50))).unique()
            assert len(used) >= len(quantizer.levels()) - 1


@pytest.mark.parametrize(
    # N2UQ's thresholds are learned apart from its levels.
    ("group", "name"),
    [choice for choice in CHOICES if choice != ("activation_quantizer", "n2uq")],
)
@settings(deadline=None, max_examples=15)
@draws
def test_every_value_gets_the_nearest_level(group, name, seed, shape, bits, factor, signed):
    x = drawn(seed, shape, factor, signed)
    quantizer = calibrated(group, name, bits, x)
    values, levels = normalized(group, name, quantizer, x), quantizer.levels().double()
    distances = (values[..., None] - levels).abs()
    chosen = distances.gather(-1, quantizer.quantize(x).long()[..., None])[..., 0]
    slack = 1e-5 * max(values.abs().max(), levels.abs().max()) + 1e-38
    assert (chosen <= distances.amin(-1) + slack).all()


@each_choice
@settings(deadline=None, max_examples=15)
@draws
def test_a_result_is_quantized_to_itself(group, name, seed, shape, bits, factor, signed):
    x = drawn(seed, shape, factor, signed)
    quantizer = calibrated(group, name, bits, x)
    once = quantizer(x).detach()
    if (group, name) in IDEMPOTENT:
        assert torch.equal(quantizer(once), once)
    else:
        # No value passes another of its channel.
        for first, second in zip(once.flatten(1), quantizer(once).detach().flatten(1), strict=True):
            assert (second[first.argsort(stable=True)].diff() >= 0).all()


@each_choice
def test_degenerate_tensors_keep_the_contract_and_finite_gradients(group, name):
    for values, bits in product(DEGENERATE.values(), BITS):
        quantizer = calibrated(group, name, bits, values)
        check_contract(group, quantizer, values)
        for factor in (1, 100):
            x = (values * factor).requires_grad_()
            quantizer.zero_grad()
            quantizer(x).sum().backward()
            assert torch.isfinite(x.grad).all()
            for parameter in quantizer.parameters():
                assert parameter.grad is None or torch.isfinite(parameter.grad).all()


@each_choice
def test_values_that_are_not_finite_are_refused(group, name):
    for value in (float("nan"), float("inf"), -float("inf")):
        values = drawn(0, (3, 5))
        values[1, 2] = value
        what = "weights" if group == "weight_quantizer" else "inputs"
        with pytest.raises(ValueError, match=f"the {what} hold NaN or infinite values"):
            make(group, name, 4).calibrate(values)


@each_choice
def test_a_bit_width_out_of_range_is_refused(group, name):
    for bits in (1, 9):
        with pytest.raises(ValueError, match=r"bit_width must lie in 2 … 8"):
            make(group, name, bits)


def run(quantizer, x, incoming):
    """Output, codes and all gradients."""
    quantizer.zero_grad()
    x = x.detach().requires_grad_()
    y = quantizer(x)
    y.backward(incoming)
    parameters = [p.grad for p in quantizer.parameters() if p.grad is not None]
    return y.detach(), quantizer.quantize(x), x.grad, parameters


@each_device
@each_choice
def test_memory_formats_give_equal_results(group, name, device):
    x, incoming = drawn(1, (6, 5, 3, 4)), drawn(2, (6, 5, 3, 4)).to(device)
    quantizer = calibrated(group, name, 3, x).to(device)
    x = x.to(device)
    contiguous = run(quantizer, x, incoming)
    last = [t.to(memory_format=torch.channels_last) for t in (x, incoming)]
    assert not last[0].is_contiguous()
    other = run(quantizer, *last)
    assert quantizer(last[0]).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(contiguous[0], other[0])
    assert torch.equal(contiguous[1], other[1])
    # Sums within gradients are in the order of memory.
    torch.testing.assert_close(contiguous[2], other[2])
    torch.testing.assert_close(contiguous[3], other[3])


@each_device
@each_choice
def test_autocast_changes_nothing(group, name, device):
    x, incoming = drawn(1, (6, 20)), drawn(2, (6, 20)).to(device)
    quantizer = calibrated(group, name, 4, x).to(device)
    x = x.to(device)
    plain = run(quantizer, x, incoming)
    with torch.autocast(device, torch.bfloat16):
        cast = run(quantizer, x, incoming)
        low = quantizer(x.bfloat16())
        low_codes = quantizer.quantize(x.bfloat16())
    assert cast[0].dtype == torch.float32
    for a, b in zip(plain[:3], cast[:3], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(plain[3], cast[3], strict=True))
    # The output of an autocast layer before it is bfloat16. It is compared in float32; a level may
    # be rounded to what the next layer would round it to.
    assert low.dtype in (torch.float32, torch.bfloat16)
    assert torch.equal(low, quantizer(x.bfloat16().float()).to(low.dtype))
    assert torch.equal(low_codes, quantizer.quantize(x.bfloat16().float()))


@on_a_gpu
@each_choice
def test_a_gpu_agrees_with_the_cpu(group, name):
    x, incoming = drawn(1, (6, 40)), drawn(2, (6, 40))
    quantizer = calibrated(group, name, 4, x)
    expected = run(quantizer, x, incoming)
    got = run(quantizer.cuda(), x.cuda(), incoming.cuda())
    check_contract(group, quantizer, x.cuda())
    # A sum in another order may move a value that stands on a border.
    assert (expected[1] != got[1].cpu()).float().mean() < 0.01
    torch.testing.assert_close(got[3], [p.cuda() for p in expected[3]], rtol=0.02, atol=0.02)


@each_choice
def test_state_dict_round_trip(group, name):
    for signed in (False, True):
        x = drawn(3, (5, 30))
        source = calibrated(group, name, 3, x if signed else x.relu())
        target = calibrated(group, name, 3, x.relu() if signed else 2 * x)
        target.load_state_dict({k: v.clone() for k, v in source.state_dict().items()})
        assert torch.equal(target(x), source(x))
        assert torch.equal(target.quantize(x), source.quantize(x))
        assert torch.equal(target.levels(), source.levels())
        if group == "activation_quantizer":
            assert (target.levels()[0] < 0) == signed
            assert target.levels()[int(target.zero_point)] == 0


@each_choice
def test_a_copy_is_equal_and_independent(group, name):
    x = drawn(3, (5, 30))
    source = calibrated(group, name, 3, x)
    twin = copy.deepcopy(source)
    expected = source(x).detach().clone()
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.copy_(tensor * 3)
    assert torch.equal(source(x), expected)


@each_choice
def test_learned_parameters_below_zero_leave_levels_in_order(group, name):
    x = drawn(3, (5, 30))
    quantizer = calibrated(group, name, 3, x)
    expected = quantizer(x).detach()
    for key, parameter in quantizer.named_parameters():
        if key in ("step", "alpha"):  # N2UQ's are logarithms or a position
            parameter.data.neg_()
    check_contract(group, quantizer, x)
    assert torch.equal(quantizer(x), expected)


@each_weight
def test_the_output_scale_puts_weights_and_results_in_the_same_units(name):
    """At 8 bits every method is close to its weights, whatever their size."""
    weight = drawn(4, (8, 60), 0.02)
    weight -= weight.mean()  # APoT leaves the mean out
    quantizer = calibrated("weight_quantizer", name, 8, weight)
    error = (quantizer(weight) - weight).norm() / weight.norm()
    # N2UQ clips by its definition at twice the mean magnitude.
    assert error < (0.3 if name == "n2uq" else 0.1)
