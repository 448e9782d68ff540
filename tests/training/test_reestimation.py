"""Batch norm's statistics before each evaluation."""

import torch
from training_helpers import Drawn, dense, same, trainer_of

from adq_train.training.average import WeightAverage
from adq_train.training.batch_norm import reestimate_batch_norm
from adq_train.training.evaluate import evaluate
from adq_train.training.reestimation import ReestimateBatchNorm


def test_batch_norm_is_estimated_anew_before_each_evaluation():
    plain, anew = dense(), dense()
    trainer_of(plain, epochs=2).fit()
    trainer = trainer_of(anew, ReestimateBatchNorm(7), epochs=2)
    trainer.train_epoch()
    last = trainer.train_epoch()
    assert torch.equal(plain[0].weight, anew[0].weight)  # training does not notice
    assert not torch.equal(plain[1].running_mean, anew[1].running_mean)
    # Of the images of its own epoch, until there are seven.
    reestimate_batch_norm(plain, [images for images, _ in Drawn(6, 6).epoch(1)])
    assert torch.equal(plain[1].running_mean, anew[1].running_mean)
    assert evaluate(plain, Drawn()).loss == last.validation_loss


def test_the_evaluated_network_alone_is_changed():
    model, other = dense(), dense()
    average = WeightAverage(model, 0.5)
    trainer_of(model, average, ReestimateBatchNorm(7), epochs=1).train_epoch()
    trainer_of(other, WeightAverage(other, 0.5), epochs=1).train_epoch()
    assert same(model, other)
    expected = average.model[1].running_mean.clone()
    reestimate_batch_norm(average.model, [images for images, _ in Drawn(6, 6).epoch(0)])
    assert torch.equal(average.model[1].running_mean, expected)


def test_so_many_images_make_one_batch():
    together, apart = dense(), dense()
    for model, size in ((together, 12), (apart, 1)):
        trainer_of(model, ReestimateBatchNorm(12, size), epochs=1).train_epoch()
    assert not torch.equal(together[1].running_var, apart[1].running_var)
    images = torch.cat([images for images, _ in Drawn(6, 6).epoch(0)])
    expected = together[1].running_var.clone()
    reestimate_batch_norm(together, [images])
    assert torch.equal(together[1].running_var, expected)


def test_a_share_is_one_of_the_training_images():
    """Of the 15 that there are, in whole batches of 6, 6 and 3."""
    models = [dense(), dense(), dense()]
    for model, amount in zip(models, ("0.5x", 12, 6), strict=True):
        trainer_of(model, ReestimateBatchNorm(amount), epochs=1).train_epoch()
    assert same(models[0], models[1])
    assert not torch.equal(models[0][1].running_mean, models[2][1].running_mean)


def test_none_leaves_the_statistics_of_training():
    models = [dense(), dense()]
    for model, hooks in zip(models, ([], [ReestimateBatchNorm(0)]), strict=True):
        trainer_of(model, *hooks, epochs=1).train_epoch()
    assert same(*models)
