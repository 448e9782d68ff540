"""The average of the weights against a slow loop, what becomes of the buffers, and its use."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training_helpers import IMAGES, Drawn, dense, same, take, trainer_of
from training_helpers import network as images_network

from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.training.average import WeightAverage, decay_at
from adq_train.training.checkpoint_folder import CheckpointFolder
from adq_train.training.checkpointing import Checkpoints
from adq_train.training.evaluate import evaluate


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    weights, inputs = AdqWeightQuantizer(2, decay=0.5), LsqActivationQuantizer(3)
    weights.calibrate(model[2].weight)
    inputs.calibrate(torch.randn(50))
    model[2] = quantized(model[2], weights, inputs)
    return model


def disturb(model, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        model[1].running_mean.add_(1.0)
        model[1].running_var.mul_(1.5)
        model[1].num_batches_tracked += 1
    model[2].weight_quantizer.adapt(model[2].weight)


def test_parameters_and_statistics_are_averages_as_in_a_slow_loop():
    model = network()
    average = WeightAverage(model, 0.6)
    names = [n for n, _ in model.named_parameters()] + ["1.running_mean", "1.running_var"]
    slow = {name: model.state_dict()[name].double().clone() for name in names}
    for step in range(1, 8):
        disturb(model, step)
        average.after_update(None, step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name in names:
            value = model.state_dict()[name].double()
            slow[name] = decay * slow[name] + (1 - decay) * value
    found = average.model.state_dict()
    for name in names:
        torch.testing.assert_close(found[name].double(), slow[name])
    assert found["1.num_batches_tracked"] == 7
    assert found.keys() == model.state_dict().keys()
    assert not any(p.requires_grad for p in average.model.parameters())


def test_codebooks_follow_the_averaged_weights_by_their_own_rule():
    model = network()
    average, alone = WeightAverage(model, 0.9), AdqWeightQuantizer(2, decay=0.5)
    alone.calibrate(model[2].weight)
    for step in range(1, 6):
        disturb(model, step)
        average.after_update(None, step)
        alone.adapt(average.model[2].weight)
    found = average.model[2].weight_quantizer
    assert torch.equal(found.codebook, alone.codebook)
    assert bool((found.codebook.diff() >= 0).all())
    assert not torch.allclose(found.codebook, model[2].weight_quantizer.codebook)


def test_a_network_that_is_a_batch_norm():
    model = nn.BatchNorm1d(3)
    average = WeightAverage(model, 0.5)
    model.running_mean.fill_(1.0)
    average.after_update(None, 100)
    assert average.model.running_mean.tolist() == [0.5] * 3


@given(st.integers(1, 10**6), st.floats(0, 0.999999))
def test_the_decay_rises_to_its_limit(step, decay):
    assert decay_at(step, decay) <= decay
    assert decay_at(step, decay) <= decay_at(step + 1, decay)
    assert decay_at(10**9, decay) == pytest.approx(decay)


def test_the_average_is_evaluated_and_in_the_end_the_model():
    model = images_network()
    average = WeightAverage(model, 0.8)
    trainer = trainer_of(model, average)
    take(trainer, *[IMAGES] * 4)
    assert trainer.evaluated is average.model is not model
    assert not torch.equal(trainer.evaluated[0].weight, model[0].weight)
    average.on_end(trainer)
    assert same(trainer.evaluated, model)


def test_training_does_not_notice_it():
    plain, averaged = dense(), dense()
    trainer_of(plain, epochs=2).fit()
    trainer = trainer_of(averaged, WeightAverage(averaged, 0.9), epochs=2)
    for _ in range(2):
        trainer.train_epoch()
    assert same(plain, averaged)


def test_the_average_is_what_is_watched_kept_and_left_in_the_model(tmp_path):
    model = dense()
    average = WeightAverage(model, 0.9)
    trainer = trainer_of(model, average, Checkpoints(CheckpointFolder(tmp_path), "k"), epochs=1)
    report = trainer.train_epoch()
    assert evaluate(average.model, Drawn()).loss == report.validation_loss
    assert evaluate(model, Drawn()).loss != report.validation_loss
    trainer.fit()
    state = CheckpointFolder(tmp_path).load("k")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name]), name
    assert not torch.equal(state["step"]["trained"]["0.weight"], state["model"]["0.weight"])
