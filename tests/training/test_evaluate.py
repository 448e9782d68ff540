import math

import pytest
import torch
from torch import nn

from adq_train.data.base import ALL
from adq_train.errors import UserError
from adq_train.training.evaluate import evaluate


class Listed:
    """Batches from a list of (logits, targets); the model passes the logits on."""

    def __init__(self, *batches):
        self.batches = [(torch.tensor(x), torch.tensor(y)) for x, y in batches]

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, batches=ALL, images=ALL):
        assert epoch == 0
        return iter(self.batches[batches])


def nats(logits, target):
    return math.log(sum(math.exp(x) for x in logits)) - logits[target]


def test_counts_and_loss_over_batches_of_different_size():
    rows = [
        [5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0],
        [0.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        [0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.6],
    ]
    # Ranks of the targets: 1st, 2nd, 7th, 5th, 6th.
    targets = [0, 6, 0, 4, 4]
    found = evaluate(nn.Identity(), Listed((rows[:4], targets[:4]), (rows[4:], targets[4:])))
    assert found.num_images == 5
    assert found.top1_percent == pytest.approx(100 * 1 / 5)
    assert found.top5_percent == pytest.approx(100 * 3 / 5)
    expected = sum(nats(row, target) for row, target in zip(rows, targets, strict=True)) / 5
    assert found.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5])
def test_with_at_most_five_classes_every_image_is_in_the_top_five(num_classes):
    logits = torch.eye(num_classes).tolist()
    targets = [(i + 1) % num_classes for i in range(num_classes)]
    found = evaluate(nn.Identity(), Listed((logits, targets)))
    assert (found.top1_percent, found.top5_percent) == (0, 100)


def test_the_sixth_is_not_in_the_top_five():
    found = evaluate(nn.Identity(), Listed(([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]] * 2, [5, 4])))
    assert (found.top1_percent, found.top5_percent) == (0, 50)


class Watching(nn.Module):
    """Notes its mode and whether gradients are on."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout(0.5)
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, self.inner.training, torch.is_grad_enabled()))
        return x


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training):
    model = Watching().train(training)
    evaluate(model, Listed(([[1.0, 0.0]], [0]), ([[1.0, 0.0]], [0])))
    assert model.seen == [(False, False, False)] * 2
    assert (model.training, model.inner.training) == (training, training)
    assert torch.is_grad_enabled()


def test_running_statistics_do_not_move():
    model = nn.BatchNorm1d(2)
    evaluate(model, Listed(([[3.0, 4.0], [5.0, 8.0]], [0, 1])))
    assert model.running_mean.tolist() == [0, 0]
    assert model.num_batches_tracked == 0


def test_no_images():
    model = nn.Identity()
    with pytest.raises(UserError, match="no images to evaluate on"):
        evaluate(model, Listed())
    assert model.training


def test_counts_are_exact_beyond_what_float32_can_count():
    """2^24 + 1 images, all right: in float32 one would be lost."""

    class Many:
        def epoch(self, epoch, batches=ALL, images=ALL):
            for count in (2**24, 1):
                yield (
                    torch.tensor([[1.0, 0.0]]).expand(count, 2),
                    torch.zeros(()).long().expand(count),
                )

    found = evaluate(nn.Identity(), Many())
    assert (found.num_images, found.top1_percent) == (2**24 + 1, 100)
    assert found.loss == pytest.approx(nats([1.0, 0.0], 0), rel=1e-3)
