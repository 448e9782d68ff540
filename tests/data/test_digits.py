import pytest
import torch
from sklearn.datasets import load_digits

from adq_train.data.base import Loading
from adq_train.data.digits import Digits

SETTINGS = {"test_images": 450, "validation_images": 150, "calibration_images": 100}


def load(seed=0, crop_padding=0, **changes):
    digits = Digits(**{**SETTINGS, **changes}, crop_padding=crop_padding)
    return digits.load(Loading(64, 256, seed, torch.device("cpu")))


def part(data, name):
    images, targets = zip(*getattr(data, name).epoch(0), strict=True)
    return torch.cat(images), torch.cat(targets)


def test_parts_hold_the_whole_set_once():
    data = load()
    parts = [part(data, name) for name in ("train", "calibration", "validation", "test")]
    assert [len(targets) for _, targets in parts] == [1097, 100, 150, 450]
    images, targets = (torch.cat(x) for x in zip(*parts, strict=True))
    # Pixels run from 0 to 16; the map to normalised values is undone by its two ends.
    pixels = (images - images.min()) / (images.max() - images.min()) * 16
    found = sorted(
        (*p.flatten().round().int().tolist(), int(t)) for p, t in zip(pixels, targets, strict=True)
    )
    digits = load_digits()
    expected = sorted(
        (*map(int, p), int(t)) for p, t in zip(digits.data, digits.target, strict=True)
    )
    assert found == expected
    assert (data.num_classes, data.image_shape, data.name) == (10, (1, 8, 8), "digits")


def test_the_seed_changes_the_order_of_training_alone():
    first, second = load(0), load(1)
    assert not torch.equal(part(first, "train")[1], part(second, "train")[1])
    for name in ("calibration", "validation", "test"):
        assert torch.equal(part(first, name)[0], part(second, name)[0])
    assert first.fingerprint == second.fingerprint


def test_crop_padding_shifts_training_images():
    plain, shifted = load(), load(crop_padding=1)
    assert not torch.equal(part(plain, "train")[0], part(shifted, "train")[0])
    assert torch.equal(part(plain, "test")[0], part(shifted, "test")[0])


@pytest.mark.parametrize("number", [0, 1797])
def test_some_images_must_be_for_testing_and_some_not(number):
    with pytest.raises(ValueError, match=f"test_images must lie in 1 … 1796, got {number}"):
        load(test_images=number)


def test_a_limit_leaves_the_test_part_and_changes_the_fingerprint():
    whole, half = load(), load(train_images=700)
    assert len(part(half, "train")[1]) == 700 - 150 - 100
    assert torch.equal(part(whole, "test")[1], part(half, "test")[1])
    assert whole.fingerprint == load(train_images=1347).fingerprint != half.fingerprint
