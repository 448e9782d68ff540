import contextlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms import v2

from adq_train.data import pictures
from adq_train.data.base import Loading
from adq_train.data.image_files import readers
from adq_train.data.image_folder import Folders
from adq_train.deploy.evaluable import read_image
from adq_train.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs/data"
CLASSES = ("bird", "cat", "dog")
KINDS = (("RGB", "JPEG"), ("L", "png"), ("RGBA", "png"), ("L", "jpg"), ("RGB", "png"))
IMAGENET = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def picture(number, mode):
    """Noise on a ramp, of a size of its own."""
    height, width = 20 + 7 * (number % 3), 18 + 5 * (number % 4)
    noise = np.random.default_rng(number).integers(0, 100, (height, width, 4))
    ramp = np.linspace(0, 150, width)[None, :, None]
    return Image.fromarray((noise + ramp).astype(np.uint8), "RGBA").convert(mode)


def write(root, part, name, count, start=0):
    folder = root / part / name
    folder.mkdir(parents=True)
    for i in range(count):
        mode, suffix = KINDS[i % len(KINDS)]
        picture(start + i, mode).save(folder / f"{i:02}.{suffix}")


@pytest.fixture
def root(tmp_path):
    for index, name in enumerate(CLASSES):
        write(tmp_path, "train", name, 5, 10 * index)
        write(tmp_path, "val", name, 2 + index, 100 + 10 * index)
    return tmp_path


def load(root, *, seed=0, num_workers=0, batch_size=4, **changes):
    sizes = {"image_size": 16, "resize": 18, "validation_images": 3, "calibration_images": 2}
    data_set = Folders(**{"root": str(root), "num_workers": num_workers, **sizes, **changes})
    return data_set.load(Loading(batch_size, 4, seed, torch.device("cpu")))


def joined(batches, epoch=0):
    images, targets = zip(*batches.epoch(epoch), strict=True)
    return torch.cat(images), torch.cat(targets)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parts_shapes_and_classes(root):
    data = load(root)
    assert (data.num_classes, data.image_shape) == (3, (3, 16, 16))
    sizes = {"train": 10, "calibration": 2, "validation": 3, "test": 9}
    for name, size in sizes.items():
        images, targets = joined(getattr(data, name))
        assert images.shape == (size, 3, 16, 16)
        assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert [len(t) for _, t in data.train.epoch(0)] == [4, 4, 2]
    assert len(data.train) == 3
    every = torch.cat([joined(getattr(data, name))[1] for name in list(sizes)[:3]])
    assert every.bincount().tolist() == [5, 5, 5]


def test_images_for_testing_come_in_order_and_as_torchvision_prepares_them(root):
    images, targets = joined(load(root).test)
    assert targets.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    steps = [v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor()]
    prepare = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), IMAGENET])
    paths = sorted((root / "val").glob("*/*"))

    def on_white(path):
        image = Image.open(path).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

    expected = torch.stack([prepare(on_white(path)) for path in paths])
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (333, 500), (60, 20)])
def test_an_image_of_ones_own_is_read_as_those_for_testing(root, size):
    path = root / "val" / "bird" / "-first.png"
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = load(root)
    expected = joined(data.test)[0][:1]
    torch.testing.assert_close(read_image(path, data.input_format), expected)


def test_every_training_image_comes_once_in_an_epoch(tmp_path):
    # Images of one brightness each: no crop can hide which one it is.
    for part, count in (("train", 12), ("val", 1)):
        (tmp_path / part / "x").mkdir(parents=True)
        for i in range(count):
            Image.new("L", (20, 20), 20 * i).save(tmp_path / part / "x" / f"{i:02}.png")
    data = load(tmp_path)
    red = [joined(part)[0][:, 0, 0, 0] for part in (data.train, data.validation, data.calibration)]
    brightness = (torch.cat(red) * 0.229 + 0.485) * 255
    assert sorted(brightness.round().int().tolist()) == [20 * i for i in range(12)]
    orders = {tuple(joined(data.train, epoch)[0][:, 0, 0, 0].tolist()) for epoch in range(3)}
    assert len(orders) == 3


def test_the_number_of_workers_changes_nothing(root):
    alone, helped = load(root), load(root, num_workers=2)
    for epoch in (1, 0):
        assert same(joined(alone.train, epoch), joined(helped.train, epoch))
    assert same(joined(alone.test), joined(helped.test))
    assert alone.fingerprint == helped.fingerprint


def test_an_epoch_that_was_left_early_does_not_disturb_the_next(root):
    expected = joined(load(root).train, 1)
    helped = load(root, num_workers=2).train
    next(helped.epoch(0))
    assert same(joined(helped, 1), expected)


def test_augmentation_depends_on_seed_epoch_and_index_alone(root):
    first = load(root, seed=3).train
    before = joined(first, 2)
    torch.manual_seed(99)
    assert same(joined(load(root, seed=3, batch_size=7).train, 2), before)

    images = first.loader.dataset
    key = (2, 5)
    assert torch.equal(images[key][0], images[key][0])
    others = [images[1, 5][0], images[2, 4][0], load(root, seed=4).train.loader.dataset[key][0]]
    assert not any(torch.equal(images[key][0], other) for other in others)


def test_training_images_are_cropped_at_random_and_mirrored(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1))
    for part, count in (("train", 43), ("val", 1)):
        (tmp_path / part / "x").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(ramp).save(tmp_path / part / "x" / f"{i:02}.png")
    images, _ = joined(load(tmp_path).train)
    rising = (images[:, 0, 8, -1] > images[:, 0, 8, 0]).sum().item()
    assert 0 < rising < 38
    assert len(images.flatten(1).unique(dim=0)) > 20
    [(tested, _)] = load(tmp_path).test.epoch(0)
    assert tested[0, 0, 8, -1] > tested[0, 0, 8, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_of_random_numbers_does_not_move(root, num_workers):
    data = load(root, num_workers=num_workers)
    state = torch.get_rng_state()
    for epoch in (0, 1):
        joined(data.train, epoch)
    joined(data.test)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_image_restarts_the_random_numbers_of_a_gpu(root, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    joined(load(root).train)
    assert seeds == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ["00.JPEG", "01.png"])
def test_a_truncated_image_is_named(root, num_workers, name):
    path = root / "val" / "cat" / name
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=f"cannot read the image {re.escape(str(path))}.*replace"):
        list(load(root, num_workers=num_workers).test.epoch(0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_left_out_up_to_the_limit(root, num_workers, caplog):
    whole = joined(load(root).test)
    paths = [root / "val" / "bird" / name for name in ("00.JPEG", "01.png")]
    broken = [*paths, root / "val" / "dog" / "03.jpg"]
    for path in broken:
        path.write_bytes(b"broken")
    data = load(root, num_workers=num_workers, skip_unreadable_images=3, batch_size=2)
    for _ in range(2):  # the second time they are known
        images, targets = joined(data.test)
        assert targets.tolist() == [1, 1, 1, 2, 2, 2]
        assert torch.equal(images, whole[0][2:8])
    assert caplog.text.count("cannot read the image") == 3
    assert f"{broken[2]} (" in caplog.text
    assert "left out (3 of at most 3, data.skip_unreadable_images)" in caplog.text
    strict = load(root, num_workers=num_workers, skip_unreadable_images=2)
    with pytest.raises(UserError, match=r"03.jpg .*skip_unreadable_images=2 are left out; replace"):
        joined(strict.test)


def test_a_batch_of_broken_images_is_left_out(root):
    for name in ("bird", "cat", "dog"):
        for path in (root / "val" / name).iterdir():
            if not (name == "dog" and path.name == "03.jpg"):
                path.write_bytes(b"broken")
    data = load(root, skip_unreadable_images=8)
    assert [targets.tolist() for _, targets in data.test.epoch(0)] == [[2]]


@pytest.mark.parametrize("content", [b"", b"hello", b"P6 2x 3 255\n"], ids=["empty", "text", "ppm"])
def test_a_file_that_is_no_image_is_named(root, content):
    path = root / "val" / "cat" / "00.ppm"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read the image {re.escape(str(path))}"):
        list(load(root).test.epoch(0))


def test_an_image_beyond_the_limit_is_named(root, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 10)
    with pytest.raises(UserError, match=r"cannot read the image .*exceeds limit"):
        list(load(root).test.epoch(0))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_folder(root, part):
    (root / part).rename(root / "elsewhere")
    with pytest.raises(UserError, match=f"{root}/{part} is not a folder of classes"):
        load(root)


def test_a_class_without_images(root):
    (root / "val" / "eel").mkdir()
    with pytest.raises(UserError, match=f"{root}/val is not a folder of classes.*eel"):
        load(root)


def test_other_classes_in_val(root):
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(UserError, match=r"train/ and val/ have different classes \(say, dog\)"):
        load(root)


def test_more_held_out_than_there_is(root):
    with pytest.raises(UserError, match="none of the 15 training images"):
        load(root, validation_images=13)


def test_parts_do_not_depend_on_the_seed_but_the_order_does(root):
    first, second = load(root), load(root, seed=1)
    for name in ("calibration", "validation", "test"):
        assert same(joined(getattr(first, name)), joined(getattr(second, name)))
    assert not torch.equal(joined(first.train)[0], joined(second.train)[0])


def test_fingerprint_tells_names_and_sizes_but_not_the_place(root, tmp_path_factory):
    before = load(root).fingerprint
    elsewhere = tmp_path_factory.mktemp("other") / "copy"
    root.rename(elsewhere)
    assert load(elsewhere).fingerprint == before
    path = elsewhere / "val" / "cat" / "01.png"
    path.write_bytes(path.read_bytes() + b"\0")
    grown = load(elsewhere).fingerprint
    path.rename(path.with_name("09.png"))
    assert len({before, grown, load(elsewhere).fingerprint}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": -1}, r"num_workers must lie in 0 … \d+, got -1"),
        ({"num_workers": 10**6}, r"num_workers must lie in 0 … \d+, got 1000000"),
        ({"image_size": 10**6, "resize": 10**6}, "resize must be at most 4096, got 1000000"),
        ({"skip_unreadable_images": -1}, "skip_unreadable_images must be at least 0, got -1"),
        ({"image_size": 0}, r"image_size must lie in 1 … resize \(18\), got 0"),
        ({"image_size": 19}, r"image_size must lie in 1 … resize \(18\), got 19"),
    ],
)
def test_bad_values(root, changes, message):
    with pytest.raises(ValueError, match=message):
        load(root, **changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_some_batches_and_some_images_are_parts_of_the_whole(root, workers):
    train = load(root, num_workers=workers).train
    whole = list(train.epoch(1))
    assert [train.size(i) for i in range(len(train))] == [len(t) for _, t in whole] == [4, 4, 2]
    for rank in range(3):
        part = slice(rank, None, 3)
        found = list(train.epoch(1, slice(1, None), part))
        expected = [(x[part], t[part]) for x, t in whole[1:]]
        assert [t.tolist() for _, t in found] == [t.tolist() for _, t in expected]
        for (images, _), (others, _) in zip(found, expected, strict=True):
            assert images.shape[0] == others.shape[0]
            assert not len(images) or torch.equal(images, others)
    assert [len(t) for _, t in train.epoch(1)] == [4, 4, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_no_file_counts_as_an_unreadable_image(root, workers, caplog):
    odd = os.fsdecode(b"caf\xe9.png")
    os.mkfifo(root / "val" / "bird" / "pipe.png")
    (root / "val" / "cat" / "dead.png").symlink_to("/nowhere.png")
    (root / "val" / "dog" / odd).touch()
    with pytest.raises(UserError, match=r"cannot read the image .*pipe.png \(not a regular file\)"):
        load(root)
    data = load(root, num_workers=workers, skip_unreadable_images=3)
    assert joined(data.test)[1].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert caplog.text.count("left out (") == 3
    assert r"caf\xe9.png (the file is empty)" in caplog.text
    assert re.fullmatch("[0-9a-f]{64}", data.fingerprint)


def test_names_beyond_utf_8(root):
    for part in ("train", "val"):
        (root / part / "dog").rename(root / part / os.fsdecode(b"d\xf6g"))
    path = root / "val" / "cat" / "00.JPEG"
    path.rename(path.with_name(os.fsdecode(b"\xe9.jpeg")))
    data = load(root)
    assert data.class_names == ("bird", "cat", "d\\xf6g")
    assert len(joined(data.test)[1]) == 9


def test_one_image_left_over_is_part_of_the_batch_before(root):
    data = load(root, batch_size=3)
    assert [len(t) for _, t in data.train.epoch(0)] == [3, 3, 4]
    assert [data.train.size(i) for i in range(len(data.train))] == [3, 3, 4]
    assert [len(t) for _, t in load(root, batch_size=4).train.epoch(0)] == [4, 4, 2]
    # The same order and the same crops.
    assert same(joined(data.train, 1), joined(load(root, batch_size=4).train, 1))


def test_an_image_alone_among_broken_ones_is_left_out_of_training(root):
    for path in sorted((root / "train").glob("*/*"))[:-6]:
        path.write_bytes(b"broken")
    data = load(root, batch_size=2, skip_unreadable_images=9)
    sizes = [len(t) for _, t in data.train.epoch(0)]
    assert len(sizes) == len(data.train) == 5
    assert 0 in sizes
    assert 1 not in sizes


def test_a_batch_beyond_memory_is_refused(root):
    with pytest.raises(UserError, match=r"data.image_size: a batch of 100,000 .* 5,033.2 GB, and"):
        load(root, image_size=2048, resize=2048, batch_size=10**5)


@pytest.mark.parametrize("layout", ["classes alone", "train alone", "train and test"])
def test_folders_without_a_part_for_testing(tmp_path, layout, caplog):
    """150 pictures work with the defaults of ``data=folder``."""
    inside = tmp_path if layout == "classes alone" else tmp_path / "train"
    for name, count in zip(CLASSES, (70, 50, 30), strict=True):
        write(inside, ".", name, count)
    if layout == "train and test":
        for name in CLASSES:
            write(tmp_path, "test", name, 4)
    defaults = OmegaConf.load(CONFIGS / "folder.yaml")
    settings = {key: defaults[key] for key in defaults if key not in ("_target_", "root")}
    with caplog.at_level("INFO", logger="adq_train"):
        data = load(tmp_path, **{**settings, "num_workers": 0,
                                 "image_size": 16, "resize": 18})  # fmt: skip
    sizes = [len(joined(x)[1]) for x in (data.test, data.validation, data.calibration, data.train)]
    if layout == "train and test":
        assert sizes == [12, 15, 15, 120]
    else:
        assert sizes == [30, 12, 12, 96]
        assert "30 of 150 images are set aside for testing" in caplog.text
    assert sum(data.class_counts) == sizes[-1]
    assert data.class_counts == tuple(joined(data.train)[1].bincount(minlength=3).tolist())


def test_a_folder_around_the_right_one_is_no_set_of_one_class(tmp_path):
    write(tmp_path / "pets", "train", "cat", 2)
    with pytest.raises(UserError, match="has no train/ and one folder, pets"):
        load(tmp_path, test_images="0.2x")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="has val/ and no train/ beside it"):
        load(tmp_path, test_images="0.2x")


def test_readers_are_the_cpus_that_a_process_may_use(root, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(9), raising=False)
    assert readers(None) == 9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (readers(None), readers(3), readers(0)) == (4, 3, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "20")
    assert readers(None) == 1
    assert load(root, num_workers=None).train.loader.num_workers == 1


def test_a_batch_comes_beside_the_step_under_way(root, monkeypatch):
    """On a GPU: copied and normalised on a stream of its own, for which the step's one waits."""
    happened = []

    class Stream:
        def wait_stream(self, other):
            happened.append(("waits for", other))

    @contextlib.contextmanager
    def on(stream):
        happened.append(("on", stream))
        yield
        happened.append("off")

    now = Stream()
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, stream: happened.append(("kept for", stream))
    )
    batches = load(root).train
    batch = [torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8), torch.tensor([0, 1])]
    images, targets = batches._sent(batch, "beside")
    assert happened == [
        ("on", "beside"), "off", ("waits for", "beside"), ("kept for", now), ("kept for", now)
    ]  # fmt: skip
    assert torch.equal(images, (batch[0].float() - batches.mean) / batches.std)
    assert targets is batch[1]
