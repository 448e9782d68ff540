"""Steps and epochs against those written by hand, in every precision."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_helpers import (
    IMAGES,
    TARGETS,
    Drawn,
    dense,
    grouped,
    network,
    same,
    sgd,
    take,
    trainer_of,
)  # fmt: skip

from adq_train.data.base import ALL, derived_seed
from adq_train.errors import UserError
from adq_train.quantization.base import Quantizer
from adq_train.quantization.pact import PactActivationQuantizer
from adq_train.training.distillation import Teacher, divergence
from adq_train.training.health import FiniteWatch
from adq_train.training.mixing import Mixing
from adq_train.training.trainer import part_sizes


@pytest.mark.parametrize("parts", [2, 3, 10])
@pytest.mark.parametrize("quantize", [False, True])
def test_accumulated_parts_are_one_batch(parts, quantize):
    dtype, tolerance = (torch.float32, 1e-4) if quantize else (torch.float64, 1e-11)
    models = [network(norm=False, quantize=quantize).to(dtype) for _ in range(2)]
    losses = []
    for model, count in zip(models, (1, parts), strict=True):
        trainer = trainer_of(model, accumulate_batches=count, label_smoothing=0.1)
        losses.append(take(trainer, *[IMAGES.to(dtype)] * 3))
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for whole, cut in zip(*(x.parameters() for x in models), strict=True):
        torch.testing.assert_close(whole, cut, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_layers_run_in_low_precision_and_quantizers_compare_in_float32(dtype):
    model = network()
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, i, o, name=name: seen.update({name: (m, i[0].detach().clone(), o)})
        )
    before = copy.deepcopy(model)
    loss = trainer_of(model, precision=dtype).step(IMAGES, TARGETS)
    assert seen["0"][2].dtype == seen["4"][2].dtype == expected
    assert seen["4"][1].dtype == expected  # what its input quantizer gets
    for name, (module, given, output) in seen.items():
        if isinstance(module, Quantizer):
            # Bit for bit what the quantizer gives outside of autocast, of the same values in
            # float32, as the layer after it sees it.
            exact = before.get_submodule(name)(given.float())
            assert exact.dtype == torch.float32
            assert torch.equal(output.to(expected), exact.to(expected)), name
    assert loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert loss.item() == pytest.approx(F.cross_entropy(before(IMAGES), TARGETS).item(), rel=0.05)


def test_the_gradients_of_fp16_are_unscaled_before_clipping():
    models = [network(norm=False), network(norm=False)]
    for model, precision in zip(models, ("float32", "fp16"), strict=True):
        take(trainer_of(model, precision=precision, gradient_clip_norm=0.2))
    start = network(norm=False)
    for name in ("0.weight", "4.weight"):
        moves = [m.get_parameter(name) - start.get_parameter(name) for m in models]
        assert (moves[0] - moves[1]).norm() < 0.02 * moves[0].norm()


def test_channels_last_changes_the_layout_alone():
    plain, last = network(), network()
    trainers = [trainer_of(plain), trainer_of(last, channels_last=True)]
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    for trainer in trainers:
        take(trainer, IMAGES, IMAGES)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_the_teacher_sees_the_mixed_images_and_the_loss_is_theirs():
    model, teacher = network(quantize=False), network(quantize=False)
    mixing = Mixing(4, cutmix_alpha=1.0)
    trainer = trainer_of(model, Teacher(teacher, 2.0, 0.3), mixing, seed=5)
    mixed, targets = mixing.on_batch(trainer, IMAGES, TARGETS)
    assert not torch.equal(mixed, IMAGES)
    z = copy.deepcopy(model).train()(mixed)
    expected = 0.3 * divergence(z, teacher.eval()(mixed), 2.0) + 0.7 * F.cross_entropy(z, targets)
    assert trainer.step(IMAGES, TARGETS).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_state_can_be_kept_safely(tmp_path):
    trainer = trainer_of(network(), precision="fp16")
    take(trainer)
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert found["step"] == trainer.state_dict()["step"]
    assert found["sums"] == trainer.state_dict()["sums"]


def test_an_epoch_is_the_loop_that_one_would_write_by_hand():
    model = dense()
    reference = copy.deepcopy(model)
    factors = [1.0, 0.5, 0.25]
    trainer = trainer_of(
        model,
        optimizer=grouped(model),
        schedule=lambda progress: factors[round(3 * progress)],
        epochs=1,
        label_smoothing=0.1,
        gradient_clip_norm=0.5,
    )
    report = trainer.train_epoch()

    optimizer, total = grouped(reference), 0.0
    rates = [group["lr"] for group in optimizer.param_groups]
    reference.train()
    for step, (images, targets) in enumerate(Drawn().epoch(0)):
        torch.manual_seed(derived_seed(0, "step", step, 0))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factors[step]
        value = F.cross_entropy(reference(images), targets, label_smoothing=0.1)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        for index in (0, 3):
            reference[index].weight_quantizer.adapt(reference[index].weight)
        total += float(value.detach()) * len(targets)
    assert report.train_loss == pytest.approx(total / 15, rel=1e-6)
    assert (report.epoch, report.step, report.lr) == (1, 3, 0.1 * 0.25)
    assert same(model, reference)


def test_the_steps_count_on_from_epoch_to_epoch():
    seen = []
    trainer = trainer_of(dense(), schedule=lambda progress: seen.append(progress) or 1.0, epochs=4)
    trainer.epoch = 2
    trainer.train_epoch()
    assert [12 * x for x in seen] == [6, 7, 8]
    assert (trainer.epoch, trainer.steps) == (3, 9)


def test_an_evaluation_before_training_changes_no_bit():
    whole, evaluated = dense(), dense().eval()
    for model in (whole, evaluated):
        trainer_of(model, epochs=2).fit()
    assert same(whole, evaluated)


def test_speed_is_reported():
    trainer = trainer_of(dense(), epochs=2)
    for _ in range(2):
        report = trainer.train_epoch()
        assert report.images_per_second > 15 / report.seconds
        assert 0 < report.data_wait_percent < 100
        assert report.peak_memory_bytes > 10**7
        assert report.seconds == trainer.seconds


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_the_regularization_of_activation_quantizers_reaches_the_gradient(precision):
    models = []
    for decay in (0.0, 0.3):
        model = dense()
        for index in (0, 3):
            inputs = PactActivationQuantizer(3, decay=decay)
            inputs.calibrate(torch.linspace(0, 1, 50))
            model[index].input_quantizer = inputs
        start = model[0].input_quantizer.alpha.item()
        given = {"optimizer": grouped(model), "batches": Drawn(6), "precision": precision}
        trainer_of(model, epochs=1, **given).train_epoch()
        models.append(model)
    plain, decayed = (model[0].input_quantizer.alpha.item() for model in models)
    # One step of SGD at the quantizers' rate, 0.1 · 0.5.
    assert plain - decayed == pytest.approx(0.05 * 0.3 * start, rel=1e-4)


def test_parts_are_those_of_chunk_but_for_a_last_one_of_a_single_image():
    for images in range(1, 40):
        for count in range(1, 12):
            chunks = [len(x) for x in torch.arange(images).chunk(count)]
            sizes = part_sizes(images, count)
            assert sum(sizes) == images
            if chunks[-1] > 1 or chunks[0] == 1:
                assert sizes == chunks
            else:
                assert sizes == [*chunks[:-2], chunks[-2] + 1]


def test_a_batch_norm_over_one_pixel_takes_all_but_a_single_image():
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4))

    trainer_of(made(), accumulate_batches=2).step(IMAGES[:3], TARGETS[:3])
    for compile in ("none", "model"):
        model = made()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        for parts in (1, 3):
            trainer = trainer_of(model, accumulate_batches=parts, compile=compile)
            with pytest.raises(
                UserError, match=r"trainer.batch_size: .* to at least 2, which"
            ) as got:
                trainer.step(IMAGES[:parts], TARGETS[:parts])
            assert "\n" not in str(got.value)
        assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_resume_within_an_epoch_is_exact(precision):
    """Steps that are left out among them; a small growth interval moves the scale of the loss."""

    def made():
        model = network()
        trainer = trainer_of(
            model, FiniteWatch(skip=2), optimizer=sgd(model, 0.02), precision=precision
        )
        if precision == "fp16":
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        return trainer

    whole, first, second = made(), made(), made()
    batches = [IMAGES, IMAGES * 2, -IMAGES, 3 * IMAGES, IMAGES.flip(0), IMAGES]
    for trainer in (whole, first):
        take(trainer, batches[0])
        trainer.model[1].register_forward_pre_hook(lambda _, x: (x[0] * math.nan,))
        take(trainer, batches[1])
        trainer.model[1]._forward_pre_hooks.clear()
    take(whole, *batches[2:])
    take(first, batches[2])
    model, kept = copy.deepcopy((first.evaluated.state_dict(), first.state_dict()))
    second.evaluated.load_state_dict(model)
    second.load_state_dict(kept)
    take(second, *batches[3:])
    assert same(second.model, whole.model)
    assert second.steps == whole.steps == 6
    assert second.state_dict()["step"] == whole.state_dict()["step"]
    assert second.state_dict()["step"]["skipped"] == 1
    if precision == "fp16":
        assert whole.scaler.get_scale() > 256


class Uneven(Drawn):
    """Of the classes 0 and 1 one has three times as many images."""

    counts = (15, 5)

    def epoch(self, epoch, batches=ALL, images=ALL):
        for pixels, _ in super().epoch(epoch, batches, images):
            yield pixels, (torch.arange(len(pixels)) % 4 == 0).long()


@pytest.mark.parametrize(("smoothing", "parts"), [(0.0, 1), (0.1, 1), (0.0, 2)])
def test_classes_weigh_the_less_the_more_images_they_have(smoothing, parts):
    model = dense(norm=False, dropout=0.0, quantize=False)
    batches = Uneven(8)
    trainer = trainer_of(
        model,
        batches=batches,
        counts=batches.counts,
        class_weights="balanced",
        label_smoothing=smoothing,
        accumulate_batches=parts,
    )
    weights = torch.tensor([20 / (2 * 15), 20 / (2 * 5)])
    assert torch.equal(trainer.class_weights, weights)
    ((images, targets),) = batches.epoch(0)
    smooth = smoothing / 2 + (1 - smoothing) * F.one_hot(targets, 2)
    expected = -(smooth * weights * F.log_softmax(model(images), 1)).sum(1).mean()
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    found = trainer.gradients(images, targets)
    torch.testing.assert_close(found, expected.detach())
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_weights_of_classes_need_their_numbers():
    with pytest.raises(UserError, match=r"class_weights: made up does not say how many images"):
        trainer_of(dense(), class_weights="balanced")
    trainer = trainer_of(dense(), counts=(7, 0), class_weights="balanced")
    assert trainer.class_weights.tolist() == [1, 0]  # a class that never comes has no say
