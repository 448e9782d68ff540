"""One step against steps written by hand, in every precision, and its resume."""

import copy
import logging
import math

import pytest
import torch
from adq_train.training.step import TrainingStep, part_sizes
from torch import nn
from torch.nn import functional as F
from training_helpers import IMAGES, TARGETS, network, sgd

from adq_train.errors import UserError
from adq_train.quantization.base import Quantizer
from adq_train.training.distillation import Teacher, divergence
from adq_train.training.mixing import Mixing


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(step, batches, done=0):
    for n, images in enumerate(batches, done):
        step(images, TARGETS, n)


@pytest.mark.parametrize("parts", [2, 3, 10])
@pytest.mark.parametrize("quantize", [False, True])
def test_accumulated_parts_are_one_batch(parts, quantize):
    dtype, tolerance = (torch.float32, 1e-4) if quantize else (torch.float64, 1e-11)
    models = [network(norm=False, quantize=quantize).to(dtype) for _ in range(2)]
    losses = []
    for model, count in zip(models, (1, parts), strict=True):
        step = TrainingStep(model, sgd(model), accumulate_batches=count, label_smoothing=0.1)
        losses.append([step(IMAGES.to(dtype), TARGETS, n).item() for n in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for whole, cut in zip(*(x.parameters() for x in models), strict=True):
        torch.testing.assert_close(whole, cut, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_layers_run_in_low_precision_and_quantizers_in_float32(dtype):
    model = network()
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, i, o, name=name: seen.update({name: (m, i[0].detach().clone(), o)})
        )
    step = TrainingStep(model, sgd(model), precision=dtype)
    before = copy.deepcopy(model)
    loss = step(IMAGES, TARGETS, 0)
    assert seen["0"][2].dtype == seen["4"][2].dtype == expected
    assert seen["4"][1].dtype == expected  # what its input quantizer gets
    for name, (module, given, output) in seen.items():
        if isinstance(module, Quantizer):
            assert output.dtype == torch.float32
            # Bit for bit what the quantizer gives outside of autocast.
            assert torch.equal(output, before.get_submodule(name)(given)), name
    assert loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert loss.item() == pytest.approx(F.cross_entropy(before(IMAGES), TARGETS).item(), rel=0.05)


def test_the_gradients_of_fp16_are_unscaled_before_clipping_and_regularization():
    models = [network(norm=False), network(norm=False)]
    for model, precision in zip(models, ("float32", "fp16"), strict=True):
        for index in (0, 4):
            model[index].weight_quantizer.commitment = 1.0
        TrainingStep(model, sgd(model), precision=precision, gradient_clip_norm=0.2)(
            IMAGES, TARGETS, 0
        )
    start = network(norm=False)
    for name in ("0.weight", "4.weight"):
        moves = [m.get_parameter(name) - start.get_parameter(name) for m in models]
        assert (moves[0] - moves[1]).norm() < 0.02 * moves[0].norm()


def test_an_overflow_of_fp16_halves_the_scale_and_leaves_the_weights(caplog):
    model = network()
    step = TrainingStep(model, sgd(model), precision="fp16")
    start = copy.deepcopy(model)
    step._scaler.load_state_dict({**step._scaler.state_dict(), "scale": 2.0**40})
    step(IMAGES, TARGETS, 0)
    assert step._scaler.get_scale() == 2.0**39
    assert step.skipped == 0
    for a, b in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)
    for index in (0, 4):
        assert same(model[index].weight_quantizer, start[index].weight_quantizer)


def test_channels_last_changes_the_layout_alone():
    plain, last = network(), network()
    step = TrainingStep(last, sgd(last), channels_last=True)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    for n in range(2):
        TrainingStep(plain, sgd(plain))(IMAGES, TARGETS, n)
        step.optimizer = sgd(last)
        step(IMAGES, TARGETS, n)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_the_teacher_sees_the_mixed_images_and_the_loss_is_theirs():
    model, teacher = network(quantize=False), network(quantize=False)
    mix = Mixing(4, 5, cutmix_alpha=1.0)
    mixed, targets = mix(IMAGES, TARGETS, 2)
    before = copy.deepcopy(model).train()
    z = before(mixed)
    expected = 0.3 * divergence(z, teacher.eval()(mixed), 2.0) + 0.7 * F.cross_entropy(z, targets)
    step = TrainingStep(model, sgd(model), mix=mix, teacher=Teacher(teacher, 2.0, 0.3))
    assert step(IMAGES, TARGETS, 2).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_resume_is_exact(precision):
    """Model, optimizer and step as ``fit`` keeps them; a small growth interval moves the scale."""

    def made():
        model = network()
        step = TrainingStep(
            model, sgd(model, 0.02), precision=precision, average_decay=0.8, skip_nonfinite_steps=2
        )
        if precision == "fp16":
            step._scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        return step

    whole, first, second = made(), made(), made()
    batches = [IMAGES, IMAGES * 2, -IMAGES, 3 * IMAGES, IMAGES.flip(0), IMAGES]
    for step in (whole, first):
        run(step, batches[:1])
        step.model[1].register_forward_pre_hook(lambda _, x: (x[0] * math.nan,))
        run(step, batches[1:2], 1)
        step.model[1]._forward_pre_hooks.clear()
    run(whole, batches[2:], 2)
    run(first, batches[2:3], 2)
    state = (first.evaluated.state_dict(), first.optimizer.state_dict(), first.state_dict())
    model, optimizer, kept = copy.deepcopy(state)
    second.evaluated.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.load_state_dict(kept)
    run(second, batches[3:], 3)
    assert same(second.model, whole.model)
    assert same(second.evaluated, whole.evaluated)
    assert second.state_dict()["scaler"] == whole.state_dict()["scaler"]
    assert second.skipped == whole.skipped == 1
    if precision == "fp16":
        assert whole.state_dict()["scaler"]["scale"] > 256


def test_the_state_can_be_kept_safely(tmp_path):
    model = network()
    step = TrainingStep(model, sgd(model), precision="fp16", average_decay=0.8)
    torch.save(step.state_dict(), tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert found["scaler"] == step.state_dict()["scaler"]


def test_the_average_is_evaluated_and_in_the_end_the_model():
    model = network()
    step = TrainingStep(model, sgd(model), average_decay=0.8)
    for n in range(4):
        step(IMAGES, TARGETS, n)
    assert step.evaluated is not model
    assert not torch.equal(step.evaluated[0].weight, model[0].weight)
    step.finish()
    assert same(step.evaluated, model)


@pytest.mark.parametrize("steps_ahead", [0, 2])
def test_a_step_that_is_not_finite_stops_with_the_layer(steps_ahead):
    model = network()
    step = TrainingStep(model, sgd(model))
    step._late.steps_ahead = steps_ahead  # as on a GPU
    run(step, [IMAGES] * 3)
    # The quantizer behind it turns NaN into a level: loss and gradients stay finite.
    model[1].register_forward_pre_hook(lambda _, x: (x[0] * math.nan,))
    good = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"step 4: .* in the output of 1 \(BatchNorm2d\);.*clip"):
        run(step, [IMAGES] * 6, 3)
    assert len(step._late.waiting) == steps_ahead
    if not steps_ahead:
        for a, b in zip(model.parameters(), good, strict=True):
            assert torch.equal(a, b)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_flags_on_their_way_are_read_at_the_end_of_an_epoch():
    model = network(quantize=False)
    step = TrainingStep(model, sgd(model))
    step._late.steps_ahead = 2
    step(IMAGES * math.inf, TARGETS, 0)
    with pytest.raises(UserError, match=r"step 1: .* in the images of the batch"):
        step.finish_epoch()
    TrainingStep(model, sgd(model)).finish_epoch()


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_steps_are_left_out_up_to_the_limit(precision, caplog):
    model = network()
    step = TrainingStep(model, sgd(model), skip_nonfinite_steps=2, precision=precision)
    step(IMAGES, TARGETS, 0)
    before = copy.deepcopy(model)
    hook = model[1].register_forward_pre_hook(lambda _, x: (x[0] * math.nan,))
    with caplog.at_level(logging.WARNING):
        run(step, [IMAGES] * 2, 1)
    hook.remove()
    assert same(model, before)  # batch norm's statistics too
    assert "step 3 is not finite and left out (2 of at most 2" in caplog.text
    step(IMAGES, TARGETS, 3)
    assert not same(model, before)
    model[4].bias.data[0] = math.nan
    with pytest.raises(UserError, match=r"step 5: .* in the output of 4 \(QuantLinear\)"):
        step(IMAGES, TARGETS, 4)


def test_a_loss_that_is_left_out_does_not_spoil_the_mean():
    model = network(quantize=False)
    step = TrainingStep(model, sgd(model), skip_nonfinite_steps=1)
    assert step(IMAGES * math.nan, TARGETS, 0).item() == 0


def test_fp16_without_scale_left_is_not_finite():
    """A gradient that no scale can save must not halve it for ever."""
    model = network()
    step = TrainingStep(model, sgd(model), precision="fp16")
    model[4].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match=r"in the gradient of 4\.weight"):
        run(step, [IMAGES] * 40)
    assert step._scaler.get_scale() <= 1


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

    model = made()
    TrainingStep(model, sgd(model), accumulate_batches=2)(IMAGES[:3], TARGETS[:3], 0)
    for compile in ("none", "model"):
        model = made()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        for parts in (1, 3):
            step = TrainingStep(model, sgd(model), accumulate_batches=parts, compile=compile)
            with pytest.raises(
                UserError, match=r"trainer.batch_size: .* to at least 2, which"
            ) as got:
                step(IMAGES[:parts], TARGETS[:parts], 0)
            assert "\n" not in str(got.value)
        assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
