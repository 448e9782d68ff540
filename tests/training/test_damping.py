"""Oscillation damping: its loss against a loop over weights, and what it does to a training."""

import re

import pytest
import torch
from training_helpers import dense, network, trainer_of

from adq_train.quantization.prepare import quantized_layers, weight_quantizers
from adq_train.training.damping import Damping, damping_loss


def test_the_loss_and_its_gradient_are_those_of_a_loop_over_the_weights():
    model = network()
    damping_loss(weight_quantizers(model)).backward()
    total = 0.0
    for layer in quantized_layers(model).values():
        levels = layer.weight_quantizer.levels()
        outside = 0
        for value, gradient in zip(
            layer.weight.detach().flatten(), layer.weight.grad.flatten(), strict=True
        ):
            inside = levels[0] <= value <= levels[-1]
            outside += not inside
            distance = (value - levels[(levels - value).abs().argmin()]) * inside
            total += float(distance) ** 2
            torch.testing.assert_close(gradient, 2 * distance)
        assert outside
    assert damping_loss(weight_quantizers(model)).item() == pytest.approx(total, rel=1e-5)
    others = [p for n, p in model.named_parameters() if not n.endswith("weight")]
    assert all(p.grad is None for p in others)


def test_it_draws_weights_to_their_levels_and_says_how_far(caplog):
    caplog.set_level("INFO")
    ends = []
    for weight in (0.0, 1.0):
        model = dense()
        trainer_of(model, Damping(model, weight), epochs=20).fit()
        ends.append([float(x) for x in re.findall(r"\d\S*", caplog.messages[-1])])
    (free, before), (damped, same) = ends
    assert same == before
    assert damped < free / 2
    squares = sum(float(x.weight.detach().square().sum()) for x in quantized_layers(model).values())
    assert damped == pytest.approx(
        damping_loss(weight_quantizers(model)).item() / squares, rel=0.05
    )
