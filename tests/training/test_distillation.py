"""The divergence against its formula, and where the teacher comes from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adq_train.errors import UserError
from adq_train.models import CifarResNetModel, TorchvisionModel
from adq_train.training.distillation import (
    LogitDistillation,
    NoDistillation,
    Teacher,
    TrainedTeacher,
    divergence,
)


def logits(seed, dtype=torch.float64):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.integers(0, 1000), st.floats(0.5, 20))
def test_the_divergence_is_its_formula(seed, temperature):
    student, teacher = logits(seed), logits(seed + 1)
    expected = 0.0
    for z, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q = [math.exp(x / temperature) for x in z]
        p = [math.exp(x / temperature) for x in t]
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    found = divergence(student, teacher, temperature).item()
    assert found == pytest.approx(temperature**2 * expected, rel=1e-8, abs=1e-12)


def test_its_gradient():
    teacher = logits(1)
    assert torch.autograd.gradcheck(
        lambda z: divergence(z, teacher, 3.0), logits(0).requires_grad_()
    )


def test_a_student_like_its_teacher_has_nothing_to_learn():
    z = logits(0).requires_grad_()
    loss = divergence(z, logits(0), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(z.grad, torch.zeros_like(z))


def test_low_precision_is_lifted():
    found = divergence(logits(0, torch.bfloat16), logits(1, torch.bfloat16), 1.0)
    assert found.dtype == torch.float32


def test_the_labels_have_the_rest_of_the_loss():
    model = nn.Linear(3, 4).train()
    images, z = torch.randn(5, 3), logits(0, torch.float32)
    teacher = Teacher(model, 2.0, 0.25)
    found = teacher.loss(z, images, lambda: torch.tensor(8.0))
    assert not model.training
    expected = 0.25 * divergence(z, model(images).detach(), 2.0) + 6
    torch.testing.assert_close(found, expected)
    alone = Teacher(model, 2.0, 1.0).loss(z, images, lambda: pytest.fail("labels were used"))
    torch.testing.assert_close(alone, divergence(z, model(images).detach(), 2.0))


def test_no_teacher():
    assert NoDistillation().teacher(nn.Linear(1, 1), 2, 3) is None


def test_the_run_s_own_float_model_is_the_default():
    model = nn.Linear(3, 4)
    teacher = LogitDistillation(temperature=3.0, weight=0.5).teacher(model, 4, 3)
    assert teacher.model is model
    assert (teacher.temperature, teacher.weight) == (3.0, 0.5)


def test_a_checkpoint_of_the_same_network(tmp_path):
    torch.manual_seed(0)
    source = CifarResNetModel(depth=8, width=2)
    own, other = source.build(4, 3), source.build(4, 3)
    torch.save(other.state_dict(), tmp_path / "teacher.pt")
    path = str(tmp_path / "teacher.pt")
    teacher = LogitDistillation(checkpoint=path).teacher(own, 4, 3)
    assert torch.equal(teacher.model.fc.weight, other.fc.weight)
    assert not torch.equal(own.fc.weight, other.fc.weight)
    with pytest.raises(UserError, match=r"distillation.checkpoint: .* does not fit the model"):
        LogitDistillation(checkpoint=path).teacher(source.build(5, 3), 5, 3)


def test_a_torchvision_network_with_a_checkpoint(tmp_path):
    other = TorchvisionModel(name="squeezenet1_1", weights=None).build(4, 3)
    torch.save(other.state_dict(), tmp_path / "teacher.pt")
    found = LogitDistillation(name="squeezenet1_1", checkpoint=str(tmp_path / "teacher.pt"))
    teacher = found.teacher(nn.Linear(1, 1), 4, 3)
    assert torch.equal(teacher.model.classifier[1].weight, other.classifier[1].weight)


def test_weights_that_know_other_classes():
    with pytest.raises(UserError, match=r"know 1000 classes, the data has 10; give a checkpoint"):
        LogitDistillation(name="resnet18", weights="DEFAULT").teacher(nn.Linear(1, 1), 10, 3)


def test_a_teacher_that_is_still_to_be_trained():
    source = CifarResNetModel(depth=14, width=3)
    teacher = TrainedTeacher(model=source, epochs=5).teacher(nn.Linear(1, 1), 4, 2)
    assert teacher.epochs == 5
    assert teacher.model.conv1.weight.shape == (3, 2, 3, 3)
    assert teacher.model.fc.out_features == 4


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be more than 0, got -1.0"),
        ({"weight": 0.0}, "weight must be more than 0 and at most 1, got 0.0"),
        ({"model": 3}, "model: must be one of configs/model, got 3"),
    ],
)
def test_bad_values_of_a_trained_teacher(knobs, message):
    with pytest.raises(ValueError, match=message):
        TrainedTeacher(**{"model": CifarResNetModel(depth=8, width=2), "epochs": 1, **knobs})


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"temperature": 0.0}, "temperature must be more than 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be more than 0, got nan"),
        ({"weight": 0.0}, "weight must be more than 0 and at most 1, got 0.0"),
        ({"weight": 1.1}, "weight must be more than 0 and at most 1, got 1.1"),
        ({"weights": "DEFAULT"}, "weights: they belong to a torchvision teacher"),
        ({"name": "resnet19"}, "name: torchvision has no classifier 'resnet19'"),
        ({"name": "resnet18"}, "needs either weights"),
        ({"name": "resnet18", "weights": "DEFAULT", "checkpoint": "x"}, "needs either weights"),
    ],
)
def test_bad_values(knobs, message):
    with pytest.raises(ValueError, match=message):
        LogitDistillation(**knobs)
