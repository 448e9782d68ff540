from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from adq_train.data.base import HeldOut, Loading
from adq_train.data.in_memory import (
    Augmentation,
    InMemoryBatches,
    Limited,
    crop_and_flip,
    split_in_memory,
)
from adq_train.errors import UserError

NONE = Augmentation()


def uint8_images(count, channels=1, height=3, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        256, (count, channels, height, width), generator=generator, dtype=torch.uint8
    )


def batches_of(images, seed=None, augmentation=NONE, batch_size=4):
    """Batches without normalisation, whose targets say which image it is."""
    channels = images.shape[1]
    return InMemoryBatches(
        images,
        torch.arange(len(images)),
        batch_size,
        torch.zeros(channels),
        torch.ones(channels),
        seed,
        augmentation,
    )


def split(train, test, *, seed=0, augmentation=NONE):
    return split_in_memory(
        "x",
        train,
        test,
        num_classes=100,
        held_out=HeldOut(validation_images=4, calibration_images=3),
        augmentation=augmentation,
        loading=Loading(5, 4, seed, torch.device("cpu")),
    )


def numbered(count, channels=1, seed=0):
    return uint8_images(count, channels, seed=seed), torch.arange(count)


def targets_of(batches, epoch=0):
    return torch.cat([targets for _, targets in batches.epoch(epoch)]).tolist()


def images_of(batches, epoch=0):
    return torch.cat([images for images, _ in batches.epoch(epoch)])


def same(first, second):
    return all(
        torch.equal(a, b) and torch.equal(s, t)
        for (a, s), (b, t) in zip(first, second, strict=True)
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_crop_and_flip_is_slicing_and_flipping_image_by_image(data):
    count, channels = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    padding = data.draw(st.integers(0, 3))
    padded = F.pad(uint8_images(count, channels, height, width), [padding] * 4)
    chosen = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, count - 1),
                st.integers(0, 2 * padding),
                st.integers(0, 2 * padding),
                st.booleans(),
            ),
            min_size=1,
            max_size=8,
        )
    )
    columns = [torch.tensor(column) for column in zip(*chosen, strict=True)]
    windows = crop_and_flip(padded, *columns, height, width)

    for window, (index, top, left, flip) in zip(windows, chosen, strict=True):
        expected = padded[index, :, top : top + height, left : left + width]
        assert torch.equal(window, torch.flip(expected, [2]) if flip else expected)
    assert windows.shape == (len(chosen), channels, height, width)
    assert windows.is_contiguous(memory_format=torch.channels_last)


def test_the_same_seed_and_epoch_give_the_same_batches():
    images = uint8_images(30)
    augmentation = Augmentation(2, flip=True)
    first, second = (batches_of(images, 7, augmentation) for _ in range(2))
    list(first.epoch(0))  # what was read before does not matter
    torch.manual_seed(123)
    assert same(first.epoch(3), second.epoch(3))
    assert images_of(first, 3).shape == (30, 1, 3, 3)


def test_another_epoch_or_seed_gives_another_order():
    images = uint8_images(30)
    orders = [
        targets_of(batches_of(images, seed), epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(("count", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_every_image_comes_exactly_once_in_an_epoch(seed, count, sizes):
    images = uint8_images(count)
    batches = batches_of(images, seed)
    found = list(batches.epoch(2))
    assert [len(targets) for _, targets in found] == sizes
    assert len(batches) == len(sizes)
    assert sorted(targets_of(batches, 2)) == list(range(count))
    for batch, targets in found:
        assert torch.equal(batch, images[targets].float())


def test_without_a_seed_the_order_stays_and_nothing_is_augmented():
    images = uint8_images(10)
    batches = batches_of(images, None, Augmentation(1, flip=True))
    for epoch in (0, 1):
        assert targets_of(batches, epoch) == list(range(10))
        assert torch.equal(images_of(batches, epoch), images.float())


def test_training_images_are_windows_and_all_shifts_and_flips_occur():
    image = uint8_images(1, channels=2)
    padded = F.pad(image[0], [1] * 4)
    windows = [padded[:, top : top + 3, left : left + 3] for top in range(3) for left in range(3)]
    windows += [window.flip(2) for window in windows]
    batches = batches_of(image.expand(400, -1, -1, -1), 0, Augmentation(1, flip=True), 400)
    [(augmented, _)] = batches.epoch(0)
    found = [
        next(i for i, window in enumerate(windows) if torch.equal(window.float(), one))
        for one in augmented
    ]
    assert set(found) == set(range(18))


def test_without_flip_no_image_is_mirrored():
    image = uint8_images(1)
    batches = batches_of(image.expand(50, -1, -1, -1), 0, Augmentation(0, flip=False), 50)
    [(images, _)] = batches.epoch(0)
    assert torch.equal(images, image.float().expand(50, -1, -1, -1))


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match="crop_padding must be at least 0, got -1"):
        Augmentation(-1)


def test_training_images_have_mean_0_and_standard_deviation_1_per_channel():
    images = uint8_images(60, channels=3)
    images[:, 1] //= 4
    data = split((images, torch.arange(60)), numbered(10, channels=3))
    pixels = images_of(data.train).transpose(0, 1).flatten(1)
    torch.testing.assert_close(pixels.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(1), torch.ones(3), atol=1e-5, rtol=0)


def test_other_parts_are_normalised_with_the_statistics_of_the_training_part():
    train, test = numbered(60, channels=3), numbered(10, channels=3, seed=1)
    data = split(train, test)
    used = train[0][targets_of(data.train)].numpy()
    mean, std = (f(used, axis=(0, 2, 3), keepdims=True) for f in (np.mean, partial(np.std, ddof=1)))
    for part, source in ((data.validation, train), (data.calibration, train), (data.test, test)):
        expected = (source[0][targets_of(part)].numpy() - mean) / std
        np.testing.assert_allclose(images_of(part).numpy(), expected, atol=1e-5)


def test_images_of_one_colour_stay_finite():
    flat = torch.full((10, 1, 2, 2), 7, dtype=torch.uint8)
    data = split((flat, torch.arange(10)), (flat, torch.arange(10)))
    assert torch.equal(images_of(data.train), torch.zeros(3, 1, 2, 2))


def test_parts_are_disjoint_complete_and_the_same_for_every_seed():
    first, second = (split(numbered(20), numbered(6), seed=seed) for seed in (0, 1))
    names = ("train", "validation", "calibration")
    parts = {name: targets_of(getattr(first, name)) for name in names}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 13, "validation": 4, "calibration": 3
    }  # fmt: skip
    assert sorted(chain(*parts.values())) == list(range(20))
    assert targets_of(first.test) == list(range(6))
    for name in ("validation", "calibration", "test"):
        assert same(getattr(first, name).epoch(0), getattr(second, name).epoch(0))
    assert sorted(targets_of(second.train)) == sorted(parts["train"])
    assert targets_of(second.train) != parts["train"]


def test_batch_sizes_and_shapes():
    data = split(numbered(20, channels=2), numbered(6, channels=2))
    assert [len(t) for _, t in data.train.epoch(0)] == [5, 5, 3]
    assert [len(t) for _, t in data.test.epoch(0)] == [4, 2]
    assert (data.name, data.num_classes, data.image_shape) == ("x", 100, (2, 3, 3))
    images, targets = next(data.train.epoch(0))
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)


def test_only_training_images_are_augmented():
    plain, augmented = (
        split(numbered(20), numbered(6), augmentation=augmentation)
        for augmentation in (NONE, Augmentation(1, flip=True))
    )
    assert not same(plain.train.epoch(0), augmented.train.epoch(0))
    for name in ("validation", "calibration", "test"):
        assert same(getattr(plain, name).epoch(0), getattr(augmented, name).epoch(0))


def test_nothing_left_to_train_on():
    with pytest.raises(UserError, match="hold out fewer"):
        split(numbered(7), numbered(6))


def test_fingerprint_tells_one_pixel_and_one_label():
    train, test = numbered(20), numbered(6, seed=1)
    before = split(train, test).fingerprint
    assert split(train, test, seed=3).fingerprint == before
    found = {before}
    for part in (train, test):
        part[0][2, 0, 1, 1] += 1
        found.add(split(train, test).fingerprint)
        part[1][2] += 1
        found.add(split(train, test).fingerprint)
    assert len(found) == 5
    assert all(len(fingerprint) == 64 for fingerprint in found)


@given(count=st.integers(1, 30), limit=st.none() | st.integers(1, 30))
def test_a_limit_takes_the_first_images_or_says_that_there_are_fewer(count, limit):
    knobs = Limited(validation_images=1, calibration_images=1, train_images=limit)
    images, targets = uint8_images(count), torch.arange(count)
    if limit is not None and limit > count:
        with pytest.raises(UserError, match=f"{limit} are asked for and there are {count}"):
            knobs.limit(images, targets)
        return
    some, labels = knobs.limit(images, targets)
    assert labels.tolist() == list(range(count))[: limit or count]
    assert torch.equal(some, images[labels])


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="train_images must be at least 1, got 0"):
        Limited(validation_images=1, calibration_images=1, train_images=0)


@pytest.mark.parametrize("seed", [None, 3])
def test_some_batches_and_some_images_are_parts_of_the_whole(seed):
    """Eleven images in batches of four, three and so on; every part is cut from the whole epoch."""
    batches = batches_of(uint8_images(11), seed, Augmentation(1, flip=True))
    whole = list(batches.epoch(2))
    assert [batches.size(i) for i in range(len(batches))] == [len(t) for _, t in whole]
    for some in (slice(1, None), slice(1, None, 2), slice(3, None)):
        assert same(batches.epoch(2, some), whole[some])
    for rank in range(4):
        part = slice(rank, None, 4)
        expected = [(x[part], t[part]) for x, t in whole[1:]]
        assert same(batches.epoch(2, slice(1, None), part), expected)
    assert len(list(batches.epoch(2, images=slice(3, None, 4)))[-1][1]) == 0


def test_images_left_over_join_the_last_batch_and_no_other_changes():
    images = uint8_images(10)
    for at_least, sizes in ((1, [3, 3, 3, 1]), (2, [3, 3, 4])):
        batches = InMemoryBatches(
            images, torch.arange(10), 3, torch.zeros(1), torch.ones(1), 5, NONE, at_least
        )
        found = list(batches.epoch(2))
        assert [len(t) for _, t in found] == sizes == [batches.size(i) for i in range(len(batches))]
        assert targets_of(batches, 2) == targets_of(batches_of(images, 5, batch_size=3), 2)
        ranks = [list(batches.epoch(2, slice(2, None), slice(r, None, 2))) for r in range(2)]
        assert sorted(torch.cat([t for part in ranks for _, t in part]).tolist()) == sorted(
            torch.cat([t for _, t in found[2:]]).tolist()
        )


def test_every_process_has_two_images_of_every_training_batch_and_calibration_no_single_one():
    def data_for(processes):
        loading = Loading(4, 2, 0, torch.device("cpu"), processes)
        return split_in_memory(
            "x", numbered(4 + 3 + 11), numbered(5), num_classes=100,
            held_out=HeldOut(validation_images=4, calibration_images=3), augmentation=NONE,
            loading=loading,
        )  # fmt: skip

    assert [len(t) for _, t in data_for(1).train.epoch(0)] == [4, 4, 3]
    assert [len(t) for _, t in data_for(2).train.epoch(0)] == [4, 7]
    assert [len(t) for _, t in data_for(2).calibration.epoch(0)] == [3]
    assert [len(t) for _, t in data_for(2).test.epoch(0)] == [2, 2, 1]
    assert targets_of(data_for(1).train) == targets_of(data_for(2).train)
