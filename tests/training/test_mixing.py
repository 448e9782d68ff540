"""Mixup and cutmix against torchvision's, and that the step alone decides the draw."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from adq_train.data.base import derived_seed
from adq_train.training.mixing import Mixing

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0])
ALPHAS = [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}]


def mixed(mixing, step, seed=3):
    """The batch of a step of a trainer with that seed."""
    return mixing.on_batch(SimpleNamespace(seed=seed, steps=step), IMAGES, TARGETS)


@pytest.mark.parametrize("alphas", ALPHAS)
def test_labels_are_probabilities_in_the_shares_of_the_images(alphas):
    mix = Mixing(5, **alphas)
    for step in range(20):
        images, targets = mixed(mix, step)
        assert targets.shape == (6, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        one_hot = F.one_hot(TARGETS, 5).float()
        share = (targets[1] @ one_hot[1]).item()
        blend = share * IMAGES + (1 - share) * IMAGES.roll(1, 0)
        expected = share * one_hot + (1 - share) * one_hot.roll(1, 0)
        torch.testing.assert_close(targets, expected)
        mine = (images == IMAGES).flatten(1).all(0)
        others = (images == IMAGES.roll(1, 0)).flatten(1).all(0)
        if bool((mine | others).all()):  # a rectangle
            assert mine.float().mean().item() == pytest.approx(share)
        else:
            torch.testing.assert_close(images, blend)


def test_a_single_transform_is_that_of_torchvision():
    torch.manual_seed(derived_seed(3, "mixing", 7))
    transform = v2.RandomChoice([v2.CutMix(alpha=0.5, num_classes=5)])
    expected = transform(IMAGES, TARGETS)
    found = mixed(Mixing(5, cutmix_alpha=0.5), 7)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_seed_and_step_alone_decide():
    first = Mixing(5, mixup_alpha=1.0)
    before = torch.get_rng_state()
    drawn = [mixed(first, step)[1] for step in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = Mixing(5, mixup_alpha=1.0)
    assert torch.equal(mixed(again, 4)[1], drawn[4])
    assert not any(torch.equal(drawn[0], x) for x in drawn[1:])
    assert not torch.equal(mixed(again, 4, seed=4)[1], drawn[4])


def test_with_both_on_each_has_its_turn():
    mix = Mixing(5, mixup_alpha=1.0, cutmix_alpha=1.0)
    cut = 0
    for step in range(40):
        images, _ = mixed(mix, step)
        cut += bool(((images == IMAGES) | (images == IMAGES.roll(1, 0))).all())
    assert 8 < cut < 32


def test_off_is_the_batch_as_it_is():
    images, targets = mixed(Mixing(5), 0)
    assert images is IMAGES
    assert targets is TARGETS


def test_a_process_without_images_has_nothing_to_mix():
    trainer = SimpleNamespace(seed=3, steps=0)
    found = Mixing(5, mixup_alpha=1.0).on_batch(trainer, IMAGES[:0], TARGETS[:0])
    assert [len(x) for x in found] == [0, 0]
