"""Flags that say whether a step was finite, where values that are not begin, and what follows."""

import copy
import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_helpers import IMAGES, Drawn, dense, network, same, take, trainer_of

from adq_train.errors import UserError
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.checkpointing import Checkpoints
from adq_train.training.health import FiniteWatch, PendingFlags, all_finite, origin


def parameters(*gradients):
    found = [nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(found, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    return found


@pytest.mark.parametrize(
    ("loss", "gradients", "expected"),
    [
        (1.0, [[1.0, 2.0], None, [0.0, -3.0]], True),
        (1.0, [[3e38, 3e38]], True),  # whose norm overflows
        (math.nan, [[1.0, 2.0]], False),
        (math.inf, [[1.0, 2.0]], False),
        (1.0, [[1.0, 2.0], [1.0, math.nan]], False),
        (1.0, [[1.0, math.nan], [1.0, 2.0]], False),
        (1.0, [[-math.inf, 0.0], None], False),
        (1.0, [None], True),
    ],
)
def test_a_step_is_finite(loss, gradients, expected):
    assert bool(all_finite(torch.tensor(loss), parameters(*gradients))) is expected


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class Net(nn.Module):
    """Spoils the values after one of its layers, or the gradients behind it."""

    def __init__(self, spoil):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.spoil = spoil
        if spoil == "weight":
            with torch.no_grad():
                self.b.weight[0, 0] = math.inf

    def forward(self, x):
        x = self.norm(self.a(x))
        x = Spoiled.apply(x) if self.spoil == "gradient" else x
        x = self.b(x)
        return x.log() - math.inf if self.spoil == "end" else x


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("weight", "the output of b (Linear)"),
        ("end", "the model's output"),
        ("gradient", "the gradient of a.weight"),
        ("nothing", "no layer: when the batch was run again, all was finite"),
        ("images", "the images of the batch"),
    ],
)
def test_where_it_begins(spoil, expected):
    torch.manual_seed(0)
    model = Net(spoil)
    images = torch.randn(4, 3)
    if spoil == "images":
        images[0] = math.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert origin(model, images, lambda: model(images).sum().backward()) == expected
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_flags_are_read_in_order_and_late():
    flags = PendingFlags(2)
    images = torch.zeros(1)
    for step, finite in enumerate([True, True, False, False]):
        flags.add(step, torch.tensor(finite), images, images)
        assert flags.failed() is None
    flags.add(4, torch.tensor(True), images, images)
    assert flags.failed().step == 2
    assert [x.step for x in flags.waiting] == [3, 4]
    assert flags.failed(0).step == 3
    assert flags.failed(0) is None
    assert not flags.waiting


def nan(_, x):
    return (x[0] * math.nan,)


@pytest.mark.parametrize("steps_ahead", [0, 2])
def test_a_step_that_is_not_finite_stops_with_the_layer(steps_ahead):
    model, watch = network(), FiniteWatch()
    watch._pending = PendingFlags(steps_ahead)  # 2 as on a GPU
    trainer = trainer_of(model, watch)
    take(trainer, *[IMAGES] * 3)
    # The quantizer behind it turns NaN into a level: loss and gradients stay finite.
    model[1].register_forward_pre_hook(nan)
    good = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"step 4: .* in the output of 1 \(BatchNorm2d\);.*clip"):
        take(trainer, *[IMAGES] * 6)
    assert len(watch._pending.waiting) == steps_ahead
    if not steps_ahead:
        for a, b in zip(model.parameters(), good, strict=True):
            assert torch.equal(a, b)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_flags_on_their_way_are_read_at_the_end_of_an_epoch():
    watch = FiniteWatch()
    watch._pending = PendingFlags(2)
    trainer = trainer_of(network(quantize=False), watch)
    take(trainer, IMAGES * math.inf)
    with pytest.raises(UserError, match=r"step 1: .* in the images of the batch"):
        watch.flush(trainer)
    FiniteWatch().flush(trainer)  # where nothing is under way


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_steps_are_left_out_up_to_the_limit(precision, caplog):
    model = network()
    trainer = trainer_of(model, FiniteWatch(skip=2), precision=precision)
    take(trainer)
    before = copy.deepcopy(model)
    broken = model[1].register_forward_pre_hook(nan)
    with caplog.at_level(logging.WARNING):
        take(trainer, IMAGES, IMAGES)
    broken.remove()
    assert same(model, before)  # batch norm's statistics too
    assert "step 3 is not finite and left out (2 of at most 2" in caplog.text
    take(trainer)
    assert not same(model, before)
    model[4].bias.data[0] = math.nan
    with pytest.raises(UserError, match=r"step 5: .* in the output of 4 \(QuantLinear\)"):
        take(trainer)


def test_a_loss_that_is_left_out_does_not_spoil_the_mean():
    trainer = trainer_of(network(quantize=False), FiniteWatch(skip=1))
    assert take(trainer, IMAGES * math.nan) == [0]


def test_an_overflow_of_fp16_halves_the_scale_and_leaves_the_weights():
    model, watch = network(), FiniteWatch()
    trainer = trainer_of(model, watch, precision="fp16")
    start = copy.deepcopy(model)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    take(trainer)
    assert trainer.scaler.get_scale() == 2.0**39
    assert watch.skipped == 0
    for a, b in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)
    for index in (0, 4):
        assert same(model[index].weight_quantizer, start[index].weight_quantizer)


def test_fp16_without_scale_left_is_not_finite():
    """A gradient that no scale can save must not halve it for ever."""
    model = network()
    trainer = trainer_of(model, FiniteWatch(), precision="fp16")
    model[4].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match=r"in the gradient of 4\.weight"):
        take(trainer, *[IMAGES] * 40)
    assert trainer.scaler.get_scale() <= 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    hooks = FiniteWatch(), Checkpoints(CheckpointFolder(tmp_path), "k")
    trainer = trainer_of(dense(quantize=False), *hooks, batches=Drawn(spoiled=(2, 0)), epochs=4)
    with pytest.raises(UserError, match=r"step 7: .*in the images of the batch; .*clip_norm"):
        trainer.fit()
    assert CheckpointFolder(tmp_path).load("k")["epoch"] == 2


def test_a_validation_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    hooks = FiniteWatch("qat"), Checkpoints(CheckpointFolder(tmp_path), "k")
    trainer = trainer_of(dense(quantize=False), *hooks, epochs=4)
    trainer.data = replace(trainer.data, validation=Drawn(spoiled=(0, 1)))
    with pytest.raises(UserError, match="qat: the validation loss is nan in epoch 1; the last"):
        trainer.fit()
    assert CheckpointFolder(tmp_path).load("k") is None
