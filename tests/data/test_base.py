import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.data.base import (
    ALL,
    BatchPlan,
    FirstBatches,
    HeldOut,
    ImageData,
    InputFormat,
    derived_seed,
    set_aside,
)
from adq_train.errors import UserError


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 100))
def test_split_gives_every_image_to_exactly_one_part(validation, calibration, training):
    held_out = HeldOut(validation_images=validation, calibration_images=calibration)
    parts = held_out.split(validation + calibration + training)
    assert [len(part) for part in parts] == [validation, calibration, training]
    assert sorted(torch.cat(parts).tolist()) == list(range(validation + calibration + training))


def test_split_is_random_but_does_not_depend_on_the_stream_of_random_numbers():
    held_out = HeldOut(validation_images=20, calibration_images=10)
    torch.manual_seed(1)
    first = held_out.split(100)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = held_out.split(100)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert first[0].tolist() != sorted(first[0].tolist())


def test_more_held_out_than_there_is():
    held_out = HeldOut(validation_images=60, calibration_images=40)
    with pytest.raises(UserError, match=r"validation_images \(60\) .* none of the 100 training"):
        held_out.split(100)
    assert len(held_out.split(101)[2]) == 1


def test_shares_are_of_the_training_images():
    held_out = HeldOut(validation_images="0.1x", calibration_images="0.25x")
    assert [len(x) for x in held_out.split(150)] == [15, 38, 97]
    assert [len(x) for x in held_out.split(3)] == [1, 1, 1]  # each one at least
    assert [len(x) for x in held_out.split(100_000)] == [10_000, 1024, 88_976]
    assert [len(x) for x in held_out.split(40, validation=False)] == [0, 10, 30]
    numbers = HeldOut(validation_images=15, calibration_images=38)
    for a, b in zip(held_out.split(150), numbers.split(150), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match=r"leave none of the 2 .*shares of them such as 0.1x"):
        held_out.split(2)


@pytest.mark.parametrize("text", ["0.1", "0x", "1.1x", "x", "-0.1x", "10%"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError, match=r"validation_images must be a number, or a share such as"):
        HeldOut(validation_images=text, calibration_images=1)


def test_images_for_testing_are_set_aside_once_for_all_seeds():
    test, rest = set_aside("0.2x", 50)
    assert sorted([*test.tolist(), *rest.tolist()]) == list(range(50))
    assert len(test) == 10
    torch.manual_seed(5)
    assert torch.equal(set_aside(10, 50)[0], test)
    with pytest.raises(UserError, match="test_images: 50 leave none"):
        set_aside(50, 50)


@pytest.mark.parametrize("name", ["validation_images", "calibration_images"])
def test_at_least_one_image_is_held_out(name):
    sizes = {"validation_images": 1, "calibration_images": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        HeldOut(**sizes)


def test_derived_seeds_are_the_same_everywhere():
    assert derived_seed(0) == 4246866556266386882
    assert derived_seed(1, 2, 3) == 1138364116778193076
    assert derived_seed(5, "layer1.0.conv1") == 4002012905125265169


def test_neighbouring_parts_give_different_seeds():
    seeds = {
        derived_seed(seed, epoch, i) for seed in range(9) for epoch in range(9) for i in range(9)
    }
    assert len(seeds) == 9**3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, 23) != derived_seed(12, 3)


class Counting:
    """Batches of 4 images whose pixels are the epoch, and how many were asked for."""

    def __init__(self, length):
        self.length = length
        self.given = 0

    def __len__(self):
        return self.length

    def epoch(self, epoch, batches=ALL, images=ALL):
        for index in range(self.length)[batches]:
            self.given += 1
            yield torch.full((4, 1, 2, 2), float(epoch)), torch.arange(4) + 4 * index


def test_first_batches_are_the_first_and_no_more_are_made():
    all_of_them = Counting(5)
    first = FirstBatches(all_of_them, 2)
    batches = list(first.epoch(3))
    assert len(first) == len(batches) == all_of_them.given == 2
    assert [targets.tolist() for _, targets in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all((images == 3).all() and len(images) == 4 for images, _ in batches)


def test_first_batches_of_a_short_epoch_cut_to_a_few_images():
    first = FirstBatches(Counting(1), 2, 3)
    [(images, targets)] = first.epoch(0)
    assert len(first) == 1
    assert images.shape == (3, 1, 2, 2)
    assert targets.tolist() == [0, 1, 2]


def test_a_dry_run_has_two_full_training_batches_and_small_others():
    data = ImageData("x", 8, (1, 2, 2), "0", *(Counting(7) for _ in range(4))).for_dry_run()
    assert [len(images) for images, _ in data.train.epoch(0)] == [4, 4]
    for part in (data.calibration, data.validation, data.test):
        assert len(part) == 2
        assert [len(images) for images, _ in part.epoch(0)] == [4, 4]
    assert (data.name, data.num_classes, data.image_shape) == ("x", 8, (1, 2, 2))


def test_parts_of_the_first_batches():
    first = FirstBatches(Sized(5), 2, 3)
    assert [first.size(i) for i in range(2)] == [3, 3]
    found = list(first.epoch(0, slice(1, None), slice(0, None, 2)))
    assert [targets.tolist() for _, targets in found] == [[4, 6]]


class Sized(Counting):
    def size(self, index):
        return 4


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 6))
def test_a_plan_takes_every_image_once_and_leaves_no_small_batch(count, batch_size, at_least):
    plan = BatchPlan(count, batch_size, at_least)
    every = list(range(count))
    parts = [every[plan.images(i)] for i in range(len(plan))]
    assert [i for part in parts for i in part] == every
    assert [len(part) for part in parts] == [plan.size(i) for i in range(len(plan))]
    assert all(len(part) == batch_size for part in parts[:-1])
    left = count % batch_size
    if left == 0 or left >= at_least or count < batch_size:
        assert len(parts) == -(-count // batch_size)  # as they ever were
    else:
        assert len(parts[-1]) == batch_size + left


def test_a_dry_run_sees_the_last_batch_and_then_a_full_one():
    class Uneven(Counting):
        def size(self, index):
            return 4

    data = ImageData("x", 8, (1, 2, 2), "0", *(Uneven(5) for _ in range(4))).for_dry_run()
    assert [targets.tolist() for _, targets in data.train.epoch(0)] == [
        [16, 17, 18, 19],
        [0, 1, 2, 3],
    ]
    assert [t.tolist() for _, t in data.train.epoch(0, slice(1, None))] == [[0, 1, 2, 3]]
    alone = FirstBatches(Uneven(1), 2, last_first=True)
    assert [targets.tolist() for _, targets in alone.epoch(0)] == [[0, 1, 2, 3]]


def test_sizes_that_a_file_claims_are_bounded():
    pixels = {"mean": [1], "std": [1], "peak": 255, "resize": 40}
    good = {"num_classes": 2, "image_shape": [1, 32, 32], "class_names": [], "pixels": pixels}
    InputFormat.from_dict(good)
    for bad, message in (
        ({"image_shape": [1, 40_000, 40_000]}, "at most 4096 a side"),
        ({"pixels": {**pixels, "resize": 10**9}}, "must lie in 1 … 4096"),
        ({"pixels": {**pixels, "std": [0]}}, "not positive"),
        ({"pixels": {**pixels, "mean": [float("nan")]}}, "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            InputFormat.from_dict({**good, **bad})
