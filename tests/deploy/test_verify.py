import pytest
import torch
from torch import nn

from adq_train.deploy.verify import Agreement, compare, require_same_classes, rounding_of, words
from adq_train.errors import UserError


class Answers(nn.Module):
    """Gives prepared logits, whatever it is asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return self.logits


class Rounded(nn.Module):
    """Logits (x, 0.5) whose first one is carried over a step by rounding alone."""

    def forward(self, x):
        tie = x + (0.1 if x.dtype == torch.float32 else 0.0)
        return torch.cat([tie, torch.full_like(x, 0.5)], 1)


IMAGES = [torch.zeros(4, 1)]


def test_a_near_tie_is_told_from_another_answer():
    images = [torch.full((2, 1), 0.45), torch.tensor([[3.0], [0.2]])]
    assert rounding_of(Rounded(), images) == pytest.approx(0.1)

    class Other(nn.Module):
        def forward(self, x):
            return Rounded()(x).flip(1)  # every answer is the other one

    found = compare(Rounded(), Other(), images)
    # Margins are 0.05, 0.05, 2.6 and 0.2; two logits may move by 0.1 each.
    assert (found.num_images, found.near_ties, found.different) == (4, 3, 1)
    assert "another top-1 on 1, and on 3 near ties" in words(found)


def test_without_rounding_no_tie_is_near():
    first = Answers([[1.0, 0.0], [1.0, 0.999], [0.0, 1.0], [0.0, 1.0]])
    second = Answers([[1.0, 0.0], [0.999, 1.0], [0.0, 1.0], [0.0, 1.0]])
    found = compare(first, second, IMAGES)
    assert (found.different, found.near_ties) == (1, 0)
    assert found.largest_difference == pytest.approx(1e-3, rel=1e-3)
    # A runtime that rounds its outputs says how far: the margin of 0.001 is within twice that.
    for resolution, near in ((0.00049, 0), (0.00051, 1)):
        found = compare(first, second, IMAGES, resolution)
        assert (found.different, found.near_ties) == (1 - near, near)
    assert compare(first, first, IMAGES) == Agreement(4, 0, 0.0)
    assert words(compare(first, first, IMAGES)) == "the same top-1 on every one"


def test_the_tolerance_is_a_share_of_the_images():
    require_same_classes(Agreement(10_000, 10, 0.1, near_ties=50), 0.001, "it")
    for refused, share in ((11, 0.001), (1, 0.0)):
        with pytest.raises(UserError, match=rf"on {refused} of 10000 .*tolerance={share:g}"):
            require_same_classes(Agreement(10_000, refused, 0.1), share, "it")
    with pytest.raises(UserError, match="no images"):
        require_same_classes(Agreement(0, 0, 0.0), 1.0, "it")


def test_what_cannot_be_compared_is_an_error():
    good = Answers([[1.0, 0.0]])
    for other, message in (
        (Answers([[float("nan"), 0.0]]), "not finite"),
        (Answers([[1.0, 0.0, 0.0]]), r"shape \(1, 3\) instead of \(1, 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            compare(good, other, IMAGES)
    with pytest.raises(UserError, match="not finite"):
        compare(Answers([[float("nan"), 0.0]]), Answers([[float("nan"), 0.0]]), IMAGES)
