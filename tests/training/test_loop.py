"""The loop against a hand-written one, its groups, and its resume."""

import copy
import math
import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adq_train.data.base import ALL, ImageData, derived_seed
from adq_train.errors import UserError
from adq_train.interrupts import Interrupted, caught
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.pact import PactActivationQuantizer
from adq_train.training.batch_norm import reestimate_batch_norm
from adq_train.training.checkpoint_folder import CheckpointFolder, Rhythm
from adq_train.training.evaluate import evaluate
from adq_train.training.loop import fit, train_epoch
from adq_train.training.optimizers import parameter_groups
from adq_train.training.schedule import Cosine
from adq_train.training.step import TrainingStep


class Drawn:
    """Batches that are a function of the epoch, as those of the data sets are."""

    def __init__(self, sizes=(6, 6, 3), spoil_epoch=None):
        self.sizes, self.spoil_epoch = sizes, spoil_epoch

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def epoch(self, epoch, batches=ALL, images=ALL):
        generator = torch.Generator().manual_seed(epoch)
        drawn = [torch.randn(size, 4, generator=generator) for size in self.sizes]
        for pixels in drawn[batches]:
            if epoch == self.spoil_epoch:
                pixels = pixels * math.inf
            yield pixels[images], (pixels.sum(1) > 0).long()[images]


def network(quantize=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
    if quantize:
        for index in (0, 3):
            weights, inputs = AdqWeightQuantizer(3, decay=0.5), N2uqActivationQuantizer(3)
            weights.calibrate(model[index].weight)
            inputs.calibrate(torch.randn(50))
            model[index] = quantized(model[index], weights, inputs)
    return model


def data_of(batches):
    return ImageData(
        name="made up",
        num_classes=2,
        image_shape=(4, 1, 1),
        fingerprint="made up",
        train=batches,
        calibration=batches,
        validation=batches,
        test=batches,
    )


def sgd(model):
    groups = parameter_groups(model, lr=0.1, weight_decay=0.01, quantizer_lr=0.05)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def run(model, folder, epochs, batches=None, key="k", batch_norm_images=0, **knobs):
    reports = []
    fit(
        TrainingStep(model, sgd(model), **knobs),
        data_of(batches or Drawn()),
        Cosine(),
        epochs=epochs,
        stage="qat",
        checkpoints=CheckpointFolder(folder),
        key=key,
        on_start=lambda done, seconds: None,
        on_epoch=lambda report, _: reports.append(report),
        batch_norm_images=batch_norm_images,
    )
    return reports


def test_an_epoch_is_the_loop_that_one_would_write_by_hand():
    model = network()
    reference = copy.deepcopy(model)
    factors = [1.0, 0.5, 0.25]
    torch.manual_seed(1)
    step = TrainingStep(model, sgd(model), label_smoothing=0.1, gradient_clip_norm=0.5)
    loss = train_epoch(step, Drawn(), 0, factors.__getitem__)

    torch.manual_seed(1)
    optimizer, total = sgd(reference), 0.0
    reference.train()
    for step, (images, targets) in enumerate(Drawn().epoch(0)):
        torch.manual_seed(derived_seed(0, "step", step, 0))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factors[step]
        value = F.cross_entropy(reference(images), targets, label_smoothing=0.1)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        for index in (0, 3):
            reference[index].weight_quantizer.adapt(reference[index].weight, step + 1)
        total += float(value.detach()) * len(targets)
    assert loss == pytest.approx(total / 15, rel=1e-6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


def test_the_steps_count_on_from_epoch_to_epoch():
    seen = []
    model = network()
    step = TrainingStep(model, sgd(model))
    train_epoch(step, Drawn(), 2, lambda done: seen.append(done) or 1.0)
    assert sorted(set(seen)) == [6, 7, 8]


def test_the_regularization_of_activation_quantizers_reaches_the_gradient():
    models = []
    for decay in (0.0, 0.3):
        model = network()
        for index in (0, 3):
            inputs = PactActivationQuantizer(3, decay=decay)
            inputs.calibrate(torch.linspace(0, 1, 50))
            model[index].input_quantizer = inputs
        start = model[0].input_quantizer.alpha.item()
        torch.manual_seed(1)
        train_epoch(TrainingStep(model, sgd(model)), Drawn(sizes=(6,)), 0, lambda _: 1.0)
        models.append(model)
    plain, decayed = (model[0].input_quantizer.alpha.item() for model in models)
    # One step of SGD at the quantizers' rate, 0.1 · 0.5.
    assert plain - decayed == pytest.approx(0.05 * 0.3 * start, rel=1e-4)


def test_the_commitment_term_reaches_the_gradient():
    plain, committed = network(), network()
    for index in (0, 3):
        committed[index].weight_quantizer.commitment = 10.0
    for model in (plain, committed):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.1, "initial_lr": 0.1}])
        train_epoch(TrainingStep(model, optimizer), Drawn(sizes=(6,)), 0, lambda _: 1.0)
    start = network()
    for index in (0, 3):
        weight = start[index].weight
        pull = 0.1 * 10.0 * (weight - start[index].weight_quantizer(weight))
        expected = plain[index].weight - pull
        torch.testing.assert_close(committed[index].weight, expected)


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("averaged", [False, True])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, done, averaged):
    knobs = {"average_decay": 0.7, "precision": "fp16"} if averaged else {}
    again_norms = 7 * averaged
    whole = network()
    reports = run(whole, tmp_path / "whole", 4, batch_norm_images=again_norms, **knobs)

    class KilledError(Exception):
        pass

    broken, seen = network(), []

    def stop(report, _):
        seen.append(report)
        if len(seen) == done + 1:
            raise KilledError  # before the checkpoint of this epoch

    with pytest.raises(KilledError):
        fit(
            TrainingStep(broken, sgd(broken), **knobs), data_of(Drawn()), Cosine(), epochs=4,
            stage="qat", batch_norm_images=again_norms,
            checkpoints=CheckpointFolder(tmp_path / "broken"), key="k",
            on_start=lambda *_: None, on_epoch=stop,
        )  # fmt: skip
    torch.manual_seed(99)
    again = network()
    rest = run(again, tmp_path / "broken", 4, batch_norm_images=again_norms, **knobs)
    assert [x.epoch for x in rest] == list(range(done + 1, 5))
    for mine, other in zip(rest, reports[done:], strict=True):
        assert (mine.train_loss, mine.validation_loss) == (other.train_loss, other.validation_loss)
        assert (mine.step, mine.lr) == (other.step, other.lr)
        assert mine.validation_top1_percent == other.validation_top1_percent
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_average_is_what_is_watched_kept_and_left_in_the_model(tmp_path):
    model = network()
    watched = []
    step = TrainingStep(model, sgd(model), average_decay=0.9)
    fit(
        step, data_of(Drawn()), Cosine(), epochs=2, stage="qat",
        checkpoints=CheckpointFolder(tmp_path), key="k", on_start=lambda *_: None,
        on_epoch=lambda report, evaluated: watched.append((report, evaluated)),
    )  # fmt: skip
    report, evaluated = watched[-1]
    assert evaluated is step.evaluated is not model
    assert evaluate(evaluated, Drawn()).loss == report.validation_loss
    state = CheckpointFolder(tmp_path).load("k")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name]), name
    assert not torch.equal(state["step"]["trained"]["0.weight"], state["model"]["0.weight"])


def test_batch_norm_is_estimated_anew_before_each_evaluation(tmp_path):
    plain = network()
    run(plain, tmp_path / "plain", 2)
    anew = network()  # which seeds dropout too
    [*_, last] = run(anew, tmp_path / "anew", 2, batch_norm_images=7)
    assert torch.equal(plain[0].weight, anew[0].weight)  # training does not notice
    assert not torch.equal(plain[1].running_mean, anew[1].running_mean)
    reestimate_batch_norm(plain, [images for images, _ in Drawn(sizes=(6, 6)).epoch(1)])
    assert torch.equal(plain[1].running_mean, anew[1].running_mean)
    assert evaluate(plain, Drawn()).loss == last.validation_loss


def test_speed_is_reported(tmp_path):
    for report in run(network(), tmp_path, 2):
        assert report.images_per_second > 15 / report.seconds
        assert 0 < report.data_wait_percent < 100
        assert report.peak_memory_bytes > 10**7


def test_a_checkpoint_of_another_run_is_not_used(tmp_path):
    run(network(), tmp_path, 2, key="one")
    assert [x.epoch for x in run(network(), tmp_path, 2, key="two")] == [1, 2]


def test_the_best_checkpoint_is_the_best_epoch(tmp_path):
    reports = run(network(), tmp_path, 5)
    tops = [x.validation_top1_percent for x in reports]
    best = CheckpointFolder(tmp_path).load("k", names=("best",))
    assert best["best_top1_percent"] == max(tops)
    assert best["epoch"] == tops.index(max(tops)) + 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step 7: .*in the images of the batch; .*clip_norm"):
        run(network(quantize=False), tmp_path, 4, Drawn(spoil_epoch=2))
    assert CheckpointFolder(tmp_path).load("k")["epoch"] == 2


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 8, 12])
def test_a_signal_in_the_middle_of_an_epoch_costs_nothing(tmp_path, stop_after):
    """Three steps an epoch: within one, at its end, and after the last step of all."""
    whole = network()
    reports = run(whole, tmp_path / "whole", 4)

    broken, calls = network(), []
    after_step = broken.register_forward_hook(
        lambda module, *_: (module.training and calls.append(1))
        or (len(calls) == stop_after and os.kill(os.getpid(), signal.SIGTERM))
        or None
    )  # fmt: skip
    with pytest.raises(Interrupted), caught():
        run(broken, tmp_path / "broken", 4)
    after_step.remove()
    assert len(calls) == stop_after
    kept = CheckpointFolder(tmp_path / "broken").load("k")
    assert 3 * kept["epoch"] + kept["sums"]["batches"] == stop_after
    again = network()
    rest = run(again, tmp_path / "broken", 4)
    for mine, other in zip(rest, reports[-len(rest) :], strict=True):
        assert (mine.train_loss, mine.validation_loss) == (other.train_loss, other.validation_loss)
        assert (mine.step, mine.lr, mine.epoch) == (other.step, other.lr, other.epoch)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_checkpoints_within_an_epoch_by_steps(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        CheckpointFolder,
        "save",
        lambda _, state, best: saved.append((state["epoch"], state["sums"]["batches"])),
    )
    model = network()
    fit(
        TrainingStep(model, sgd(model)), data_of(Drawn((4, 4, 4, 4, 4))), Cosine(), epochs=2,
        stage="qat", checkpoints=CheckpointFolder(tmp_path), key="k", on_start=lambda *_: None,
        on_epoch=lambda *_: None, rhythm=Rhythm(steps=2),
    )  # fmt: skip
    assert saved == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]


def test_checkpoints_by_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("adq_train.training.checkpoint_folder.time.monotonic", lambda: now[0])
    rhythm = Rhythm(minutes=0.5)
    assert not rhythm.due(1)
    now[0] += 30
    assert rhythm.due(2)
    rhythm.saved()
    assert not rhythm.due(3)
    assert not Rhythm().due(1)


def test_a_last_step_that_takes_what_is_left_over_is_said_once(tmp_path, caplog):
    caplog.set_level("INFO")
    run(network(), tmp_path / "a", 2, Drawn((6, 7)))
    assert caplog.text.count("the last step of an epoch takes 7 images: 1 left over") == 1
    caplog.clear()
    run(network(), tmp_path / "b", 2, Drawn((6, 3)))
    assert "left over" not in caplog.text
