import gzip
import re
import struct
import tracemalloc

import pytest
import torch

from adq_train.data import fashion_mnist
from adq_train.data.base import Loading
from adq_train.data.fashion_mnist import DEBIAN_FOLDER, FILES, FashionMnist, read_idx
from adq_train.errors import UserError

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES


def idx(shape, values):
    """An IDX file of unsigned bytes, from the format's description."""
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(values)


def pixel(image, row, column):
    return (image * 31 + row * 7 + column) % 256


def images(count, size=28):
    numbers = range(size)
    values = [pixel(i, y, x) for i in range(count) for y in numbers for x in numbers]
    return idx((count, size, size), values)


def labels(count):
    return idx((count,), [i % 10 for i in range(count)])


def contents():
    return dict(zip(FILES, (images(12), labels(12), images(5), labels(5)), strict=True))


def write(folder, files=None, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or contents()).items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)


def load(root, batch_size=4, **changes):
    settings = {"validation_images": 2, "calibration_images": 1, "crop_padding": 0, "flip": False}
    data_set = FashionMnist(root=None if root is None else str(root), **{**settings, **changes})
    return data_set.load(Loading(batch_size, batch_size, 0, torch.device("cpu")))


def targets(batches):
    return torch.cat([t for _, t in batches.epoch(0)])


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No Debian package, and an empty cache."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "CACHE_FOLDER", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("zipped", [False, True])
def test_pixels_and_labels_of_idx_files(tmp_path, zipped):
    write(tmp_path, zipped=zipped)
    suffix = ".gz" if zipped else ""
    found = read_idx(tmp_path / f"{TRAIN_IMAGES}{suffix}")
    assert (found.shape, found.dtype) == ((12, 28, 28), torch.uint8)
    for place in ((0, 0, 0), (3, 5, 27), (11, 27, 1)):
        assert found[place] == pixel(*place)
    assert read_idx(tmp_path / f"{TEST_LABELS}{suffix}").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("zipped", [False, True])
def test_load_from_a_folder(tmp_path, zipped):
    write(tmp_path, zipped=zipped)
    data = load(tmp_path)
    assert (data.name, data.num_classes, data.image_shape) == ("fashion_mnist", 10, (1, 28, 28))
    held_out = [*targets(data.validation).tolist(), *targets(data.calibration).tolist()]
    every = [*targets(data.train).tolist(), *held_out]
    assert sorted(every) == sorted(i % 10 for i in range(12))
    assert targets(data.test).tolist() == [0, 1, 2, 3, 4]
    # Normalised test images rise with the pixels that were written.
    [first, _] = [x for x, _ in data.test.epoch(0)]
    raw = torch.tensor([[pixel(0, y, x) for x in range(28)] for y in range(28)])
    assert torch.corrcoef(torch.stack([first[0, 0].flatten(), raw.flatten().float()]))[0, 1] > 0.999


def test_plain_and_zipped_files_are_the_same_data(tmp_path):
    write(tmp_path / "plain")
    write(tmp_path / "zipped", zipped=True)
    assert load(tmp_path / "plain").fingerprint == load(tmp_path / "zipped").fingerprint


def test_the_folder_that_torchvision_leaves_is_found(tmp_path):
    write(tmp_path / "FashionMNIST" / "raw", zipped=True)
    assert len(targets(load(tmp_path).test)) == 5


def test_debian_before_the_cache_before_a_download(nowhere, monkeypatch):
    for folder, count in (("cache", 6), ("debian", 7)):
        test_part = {TEST_IMAGES: images(count), TEST_LABELS: labels(count)}
        write(nowhere / folder, {**contents(), **test_part})
        monkeypatch.setattr(fashion_mnist, "FashionMNIST", None)
        assert len(targets(load(None).test)) == count


def test_what_is_not_there_is_downloaded_once(nowhere, monkeypatch):
    downloads = []

    def download(root, download):
        downloads.append(root)
        write(nowhere / "cache" / "FashionMNIST" / "raw", zipped=True)

    monkeypatch.setattr(fashion_mnist, "FashionMNIST", download)
    for _ in range(2):
        assert len(targets(load(None).test)) == 5
    assert downloads == [str(nowhere / "cache")]


def test_a_failed_download_says_what_to_do(nowhere, monkeypatch):
    def download(root, download):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(fashion_mnist, "FashionMNIST", download)
    message = r"could not be downloaded into .*\(File not found.*dataset-fashion-mnist.*data\.root"
    with pytest.raises(UserError, match=message):
        load(None)


def test_a_given_folder_is_never_replaced_by_another_place(nowhere):
    write(nowhere / "debian")
    (nowhere / "given").mkdir()
    with pytest.raises(UserError, match=f"{nowhere}/given does not hold Fashion-MNIST.*idx3-ubyte"):
        load(nowhere / "given")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{tmp_path} does not hold.*{name}"):
        load(tmp_path)


def test_a_zipped_file_cut_off_anywhere(tmp_path):
    whole = gzip.compress(labels(12))
    path = tmp_path / "labels.gz"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_idx(path)
    path.write_bytes(whole)
    assert len(read_idx(path)) == 12


def test_a_damaged_zipped_file(tmp_path):
    whole = bytearray(gzip.compress(labels(12)))
    whole[-6] ^= 1  # in the checksum
    path = tmp_path / "labels.gz"
    path.write_bytes(whole)
    with pytest.raises(UserError, match=str(path)):
        read_idx(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\x09\x01" + labels(3)[4:],
        b"\x1f\x8b\x08\x01" + labels(3)[4:],
        b"",
        labels(3)[:3],
        labels(3)[:6],
        labels(3)[:-1],
        labels(3) + b"\0",
        images(2)[:-28],
        bytes([0, 0, 8, 255]) + bytes(4 * 255),
        idx((1, 40_000, 40_000), []),
        idx((2**16, 2**16, 2**32 - 1), []),
        idx((2**32 - 1,) * 3, []),
    ],
    ids=[
        "type", "gzip", "empty", "no dimensions", "no shape", "short", "long", "short images",
        "dimensions", "large", "divisible by 2^32", "overflow",
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_that_are_not_what_they_should_be(tmp_path, content, suffix):
    path = tmp_path / f"{TRAIN_LABELS}{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(UserError, match=f"{path} is not an intact IDX file.*remove it and fetch"):
        read_idx(path)


def test_no_more_is_unpacked_than_the_header_says(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(labels(12) + bytes(50_000_000), 1))
    tracemalloc.start()
    with pytest.raises(UserError, match="not an intact IDX file"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    path.write_bytes(gzip.compress(idx((1, 20_000, 20_000), [0])))
    with pytest.raises(UserError, match=r"up to 100,000,000 bytes .*\(1, 20000, 20000\)"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (TRAIN_LABELS, labels(11)),
        (TEST_IMAGES, images(4)),
        (TEST_IMAGES, labels(5)),
        (TRAIN_LABELS, images(12)),
        (TRAIN_LABELS, idx((), [3])),
        (TEST_LABELS, idx((5,), [0, 1, 2, 3, 10])),
        (TEST_IMAGES, idx((5, 0, 28), [])),
    ],
    ids=[
        "count", "test count", "labels as images", "images as labels", "scalar", "label 10",
        "no pixels",
    ],
)  # fmt: skip
def test_files_that_do_not_belong_together(tmp_path, name, content):
    write(tmp_path, {**contents(), name: content})
    with pytest.raises(UserError, match="do not belong together"):
        load(tmp_path)


def test_a_test_part_without_images(tmp_path):
    write(tmp_path, {**contents(), TEST_IMAGES: images(0), TEST_LABELS: labels(0)})
    with pytest.raises(UserError, match=r"images of shape \(0, 28, 28\)"):
        load(tmp_path)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_real_files():
    data = load(None, 1000, validation_images=5000, calibration_images=1000)
    parts = [targets(part) for part in (data.train, data.validation, data.calibration, data.test)]
    assert [len(part) for part in parts] == [54000, 5000, 1000, 10000]
    assert torch.cat(parts[:3]).bincount().tolist() == [6000] * 10
    assert parts[3].bincount().tolist() == [1000] * 10
    assert parts[3][:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


def test_a_limit_takes_the_first_training_images(tmp_path):
    write(tmp_path)
    some, every = load(tmp_path, train_images=5), load(tmp_path)
    found = torch.cat([targets(x) for x in (some.train, some.validation, some.calibration)])
    assert sorted(found.tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(targets(some.test), targets(every.test))
    assert some.fingerprint != every.fingerprint


def test_test_images_of_another_size(tmp_path):
    write(tmp_path, {**contents(), TEST_IMAGES: images(5, 14)})
    with pytest.raises(UserError, match=r"\(1, 28, 28\) and test images of shape \(1, 14, 14\)"):
        load(tmp_path)


def test_padding_beyond_the_image(tmp_path):
    with pytest.raises(ValueError, match=r"crop_padding must lie in 0 … 28, got 1000000"):
        load(tmp_path, crop_padding=10**6)
