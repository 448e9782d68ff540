import copy

import pytest
import torch
from torch import nn

from adq_train.errors import UserError
from adq_train.sensitivity.outputs import caveat, float_outputs


def test_outputs_are_those_of_evaluation_and_the_model_is_left_as_it_was(small, batches):
    before = copy.deepcopy(small.state_dict())
    outputs = float_outputs(small, batches)
    assert all(m.training for m in small.modules())
    assert all(torch.equal(small.state_dict()[name], value) for name, value in before.items())
    small.eval()
    assert all(torch.equal(y, small(x)) for y, (x, _) in zip(outputs, batches, strict=True))


def test_outputs_that_are_not_finite_are_counted_and_traced(small, batches):
    (images, targets), second = batches
    images = images.clone()
    images[1:3, 0, 0, 0] = torch.inf
    with pytest.raises(UserError, match=r"infinite for 2 of 7 .*, from the images of the batch"):
        float_outputs(small, [(images, targets), second])
    small.shared.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=r"for 7 of 7 calibration images, .* of shared \(Conv2d\)"):
        float_outputs(small, batches)
    assert small.training


def labels(count=400, classes=4):
    return torch.arange(count) % classes


def logits(right, count=400, classes=4):
    """Outputs that are right for a share of the images, and name the next class for the others."""
    targets = labels(count, classes)
    wrong = torch.arange(count) >= right * count
    named = (targets + wrong) % classes
    return nn.functional.one_hot(named, classes).float()


def test_a_model_that_learned_something_has_no_caveat():
    # 0.25 + 2 · √(0.25 · 0.75 / 400) = 0.293
    assert caveat([logits(0.3)], [labels()]) is None
    assert "at chance on the calibration images (29.0 % right)" in caveat(
        [logits(0.29)], [labels()]
    )


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e6])
def test_dead_outputs_are_told_with_and_without_targets(scale):
    dead = scale * torch.tensor([[0.5, -1.0]]).expand(8, 2)
    for targets in (labels(8), torch.empty(0, dtype=torch.long)):
        assert "the same for every" in caveat([dead[:5], dead[5:]], [targets])
    assert caveat([dead[:1]], [torch.empty(0)]) is None


def test_one_class_for_all_is_told_where_there_are_classes():
    outputs = torch.randn(40, 3)
    outputs[:, 1] += 100
    assert "predicts one class" in caveat([outputs], [labels(40)])
    # Values of a regression, maps, and images of one class have no such thing.
    assert caveat([outputs], [torch.empty(0, dtype=torch.long)]) is None
    assert caveat([outputs], [torch.randn(40)]) is None
    assert caveat([outputs], [torch.ones(40, dtype=torch.long)]) is None
    assert caveat([torch.randn(40, 1, 2, 2)], [labels(40)]) is None
