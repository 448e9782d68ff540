import math
from itertools import product

import pytest
import torch
from torch import nn

from adq_train.quantization.dorefa import (
    DorefaActivationQuantizer,
    DorefaWeightQuantizer,
    normalized_tanh,
)

BITS = range(2, 9)


def quantize_k(r, bits):
    steps = 2**bits - 1
    return round(r * steps) / steps


def test_weights_are_the_papers_formula():
    for bits in BITS:
        weights = torch.randn(60, dtype=torch.float64).tolist()
        largest = max(abs(math.tanh(w)) for w in weights)
        expected = [2 * quantize_k(math.tanh(w) / (2 * largest) + 0.5, bits) - 1 for w in weights]
        quantizer = DorefaWeightQuantizer(bits, rescale=False).double()
        got = quantizer(torch.tensor(weights, dtype=torch.float64))
        # The level table is float32.
        torch.testing.assert_close(
            got, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
        )
        assert quantizer.output_scale(got) == 1


def test_activations_are_the_papers_formula():
    for bits in BITS:
        inputs = (2 * torch.rand(60, dtype=torch.float64)).tolist()
        expected = [quantize_k(min(max(x, 0), 1), bits) for x in inputs]
        quantizer = DorefaActivationQuantizer(bits, clip=1.0)
        quantizer.calibrate(torch.tensor([5.0]))
        got = quantizer(torch.tensor(inputs, dtype=torch.float64))
        assert got.tolist() == pytest.approx(expected)


def test_a_clip_that_is_not_given_has_the_least_squared_error():
    for bits, sign in product((2, 3, 4, 5), (-1, 1)):
        values = torch.randn(2000).abs() * 2 if sign > 0 else torch.randn(2000) * 2
        quantizer = DorefaActivationQuantizer(bits)
        quantizer.calibrate(values)
        rivals = [DorefaActivationQuantizer(bits, clip=c / 20) for c in range(20, 150)]
        for rival in rivals:
            rival.calibrate(values)
        least = min(float((q(values) - values).square().sum()) for q in rivals)
        assert (quantizer(values) - values).square().sum() <= least * 1.01
        other = DorefaActivationQuantizer(bits)
        other.load_state_dict(quantizer.state_dict())
        assert torch.equal(other.levels(), quantizer.levels())


def test_levels():
    for bits in BITS:
        steps = 2**bits - 1
        expected = [2 * k / steps - 1 for k in range(steps + 1)]
        levels = DorefaWeightQuantizer(bits).levels()
        assert levels.tolist() == pytest.approx(expected, abs=1e-6)
        assert (levels != 0).all()
        torch.testing.assert_close(levels, -levels.flip(0))
        inputs = DorefaActivationQuantizer(bits, clip=3.0)
        assert inputs.levels().tolist() == pytest.approx([3 * k / steps for k in range(steps + 1)])
        inputs.calibrate(torch.tensor([-1.0, 2.0]))
        reach = 2 ** (bits - 1) - 1
        expected = [3 * k / reach for k in range(-reach, reach + 1)]
        assert inputs.levels().tolist() == pytest.approx(expected)


def test_the_gradient_of_weights_is_that_of_the_normalised_tanh():
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(5, 6, dtype=torch.float64)
    quantizer = DorefaWeightQuantizer(3, rescale=False).double()
    quantizer(weight).backward(incoming)

    def loss(w):
        return ((w.tanh() / w.tanh().abs().max()) * incoming).sum()

    h = 1e-6
    units = h * torch.eye(30, dtype=torch.float64).view(30, 5, 6)
    w = weight.detach()
    expected = torch.stack([(loss(w + u) - loss(w - u)) / (2 * h) for u in units]).view(5, 6)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_multiplied_by_the_scale_and_not_through_it():
    weight = torch.randn(5, 6, dtype=torch.float64)
    grads = []
    for rescale in (False, True):
        leaf = weight.clone().requires_grad_()
        quantizer = DorefaWeightQuantizer(3, rescale=rescale).double()
        quantizer(leaf).square().sum().backward()
        grads.append(leaf.grad)
    scale = quantizer.output_scale(weight)
    torch.testing.assert_close(grads[1], scale.square() * grads[0])


def test_the_scale_is_the_least_squares_factor():
    weight = 0.05 * torch.randn(200)
    levels = DorefaWeightQuantizer(3, rescale=False)(weight)
    expected = torch.linalg.lstsq(levels[:, None], weight[:, None]).solution.squeeze()
    quantizer = DorefaWeightQuantizer(3)
    torch.testing.assert_close(quantizer.output_scale(weight), expected)
    torch.testing.assert_close(quantizer(weight), levels * expected)


def test_batch_normalization_takes_the_scale_out_again():
    x, weight = torch.randn(16, 12), 0.05 * torch.randn(7, 12)
    norm = nn.BatchNorm1d(7, eps=1e-12)
    outputs = [norm(x @ DorefaWeightQuantizer(4, rescale=r)(weight).T) for r in (False, True)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_a_result_quantized_again_keeps_its_signs_and_its_ends():
    weight = torch.randn(400)
    quantizer = DorefaWeightQuantizer(3)
    once = quantizer(weight)
    twice = quantizer(once)
    assert not torch.equal(once, twice)
    assert torch.equal(once.sign(), twice.sign())
    for end in (once.min(), once.max()):  # the tanh may bend a neighbour up to an end
        assert (quantizer.levels()[quantizer.quantize(once)[once == end].long()].abs() == 1).all()


def test_the_gradient_of_inputs_is_zero_outside_the_range():
    x = torch.tensor([-2.5, -0.5, 0.5, 1.5, 2.5], requires_grad=True)
    incoming = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    for sample, expected in (([1.0], [0, 0, 4, 8, 0]), ([-1.0], [0, 2, 4, 8, 0])):
        quantizer = DorefaActivationQuantizer(3, clip=2.0)
        quantizer.calibrate(torch.tensor(sample))
        x.grad = None
        quantizer(x).backward(incoming)
        assert x.grad.tolist() == expected


def test_normalized_tanh_of_zeros():
    weight = torch.zeros(3, requires_grad=True)
    normalized_tanh(weight).sum().backward()
    assert normalized_tanh(weight).tolist() == [0, 0, 0]
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_a_clip_out_of_range_is_named(clip):
    with pytest.raises(ValueError, match="clip must be positive"):
        DorefaActivationQuantizer(3, clip=clip)
