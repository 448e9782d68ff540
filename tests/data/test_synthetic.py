import pytest
import torch

from adq_train.data.base import Loading
from adq_train.data.synthetic import Synthetic

SETTINGS = {
    "like": "cifar10",
    "train_images": 600,
    "test_images": 100,
    "validation_images": 40,
    "calibration_images": 20,
}


def load(seed=0, **changes):
    synthetic = Synthetic(**{**SETTINGS, **changes})
    return synthetic.load(Loading(64, 64, seed, torch.device("cpu")))


def part(batches):
    images, targets = zip(*batches.epoch(0), strict=True)
    return torch.cat(images), torch.cat(targets)


@pytest.mark.parametrize(
    ("like", "shape", "num_classes"),
    [
        ("digits", (1, 8, 8), 10),
        ("fashion_mnist", (1, 28, 28), 10),
        ("cifar10", (3, 32, 32), 10),
        ("cifar100", (3, 32, 32), 100),
        ("imagenet", (3, 224, 224), 1000),
    ],
)
def test_shapes_and_classes(like, shape, num_classes):
    sizes = {"train_images": 9, "test_images": 4, "validation_images": 2, "calibration_images": 1}
    data = load(like=like, **sizes)
    assert (data.image_shape, data.num_classes) == (shape, num_classes)
    assert data.name == f"synthetic-{like}"
    for batches, count in ((data.train, 6), (data.validation, 2), (data.test, 4)):
        images, targets = part(batches)
        assert images.shape == (count, *shape)
        assert images.isfinite().all()
        assert ((targets >= 0) & (targets < num_classes)).all()


def test_every_class_occurs():
    assert set(part(load().train)[1].tolist()) == set(range(10))


def test_the_same_images_for_every_seed():
    first = load()
    torch.manual_seed(99)
    second = load(seed=1)
    assert first.fingerprint == second.fingerprint
    assert torch.equal(part(first.test)[0], part(second.test)[0])
    assert first.fingerprint != load(like="cifar100").fingerprint


def test_the_images_of_the_test_part_are_others():
    data = load()
    images = torch.cat([part(data.train)[0], part(data.test)[0]]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)


@pytest.mark.parametrize("like", ["digits", "cifar10"])
def test_a_class_can_be_told_by_the_nearest_mean_of_the_training_images(like):
    data = load(like=like)
    images, targets = part(data.train)
    means = torch.stack([images[targets == c].mean(0) for c in range(10)])
    images, targets = part(data.test)
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == targets).float().mean() > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"like": "mnist"}, "like must be one of digits, .*, got 'mnist'"),
        ({"train_images": 0}, "train_images must be at least 1, got 0"),
        ({"test_images": 0}, "test_images must be at least 1, got 0"),
        ({"train_images": 10**15}, r"train_images: 1,000,000,000,000,000 .* GB, and at most 4 GB"),
        (
            {"test_images": 10**15, "like": "imagenet"},
            r"150,528 bytes take .* 26,573 images in all",
        ),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        load(**changes)
