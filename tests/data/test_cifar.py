import hashlib
import os
import pickle

import numpy as np
import pytest
import torch

from adq_train.data import cifar
from adq_train.data.base import Loading
from adq_train.data.cifar import VERSIONS, Cifar, read_binary
from adq_train.errors import UserError

NAMES = list(VERSIONS)


def pixel(image, channel, row, column):
    return (image * 37 + channel * 101 + row * 5 + column * 3) % 256


def flat(image):
    """The published order: all of red row by row, then green, then blue."""
    side = range(32)
    return bytes(pixel(image, c, y, x) for c in range(3) for y in side for x in side)


def label(name, image):
    return image % len(VERSIONS[name].class_names)


def binary(name, numbers):
    """Records of the binary version; CIFAR-100 has a coarse label before the fine one."""
    coarse = [b"\x13"] if name == "cifar100" else [b""]
    return b"".join(part for i in numbers for part in (*coarse, bytes([label(name, i)]), flat(i)))


def pickled(name, numbers, **more):
    rows = np.array([list(flat(i)) for i in numbers], np.uint8)
    key = "fine_labels" if name == "cifar100" else "labels"
    return pickle.dumps({**more, "data": rows, key: [label(name, i) for i in numbers]})


def parts(name):
    """A small version of the whole set, images numbered through; the test part comes last."""
    if name == "cifar10":
        return [*(range(3 * i, 3 * i + 3) for i in range(5)), range(90, 94)]
    return [range(15), range(90, 94)]


def write_binary(root, name, in_root=False):
    folder = root if in_root else root / VERSIONS[name].binary_folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, numbers in zip(VERSIONS[name].binary_files, parts(name), strict=True):
        (folder / file).write_bytes(binary(name, numbers))
    return folder


def write_python(root, name):
    """The python version, as torchvision leaves it."""
    kind = VERSIONS[name].python
    folder = root / kind.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for file, _ in kind.train_list + kind.test_list]
    for file, numbers in zip(files, parts(name), strict=True):
        (folder / file).write_bytes(pickled(name, numbers))
    names = list(VERSIONS[name].class_names)
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    return folder


@pytest.fixture
def publish(monkeypatch):
    """Makes the files in a folder the published ones, as far as torchvision knows."""

    def publish(folder, name):
        def md5(file):
            return hashlib.md5((folder / file).read_bytes()).hexdigest()

        kind = VERSIONS[name].python
        for files in ("train_list", "test_list"):
            sums = [[file, md5(file)] for file, _ in getattr(kind, files)]
            monkeypatch.setattr(kind, files, sums)
        meta = {**kind.meta, "md5": md5(kind.meta["filename"])}
        monkeypatch.setattr(kind, "meta", meta)

    return publish


def load(root, name, download=True, **changes):
    knobs = {"validation_images": 2, "calibration_images": 1, "crop_padding": 0, "flip": False}
    data_set = Cifar(name=name, root=None if root is None else str(root), **{**knobs, **changes})
    return data_set.load(Loading(4, 4, 0, torch.device("cpu"), download=download))


def targets(batches):
    return torch.cat([t for _, t in batches.epoch(0)]).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_binary_records(tmp_path, name):
    path = tmp_path / "x.bin"
    path.write_bytes(binary(name, [5, 93, 8]))
    images, labels = read_binary(path, VERSIONS[name].label_bytes, 100)
    assert (images.shape, images.dtype) == ((3, 3, 32, 32), torch.uint8)
    for position, image in enumerate((5, 93, 8)):
        for channel, row, column in ((0, 0, 0), (0, 0, 31), (1, 31, 0), (2, 7, 19)):
            expected = pixel(image, channel, row, column)
            assert images[position, channel, row, column] == expected
    assert labels.tolist() == [label(name, i) for i in (5, 93, 8)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["binary", "binary in the root", "python"])
def test_load(tmp_path, publish, name, form):
    if form == "python":
        publish(write_python(tmp_path, name), name)
    else:
        write_binary(tmp_path, name, in_root=form == "binary in the root")
    data = load(tmp_path, name)
    assert (data.name, data.image_shape) == (name, (3, 32, 32))
    assert data.num_classes == len(data.class_names) == {"cifar10": 10, "cifar100": 100}[name]
    assert targets(data.test) == [label(name, i) for i in range(90, 94)]
    every = [*targets(data.train), *targets(data.validation), *targets(data.calibration)]
    assert sorted(every) == sorted(label(name, i) for i in range(15))


@pytest.mark.parametrize("name", NAMES)
def test_both_versions_are_the_same_data(tmp_path, publish, name):
    write_binary(tmp_path / "binary", name)
    publish(write_python(tmp_path / "python", name), name)
    found = [load(tmp_path / form, name) for form in ("binary", "python")]
    assert found[0].fingerprint == found[1].fingerprint
    for a, b in zip(found[0].train.epoch(0), found[1].train.epoch(0), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_binary_file(tmp_path, name):
    folder = write_binary(tmp_path, name)
    (folder / VERSIONS[name].binary_files[-1]).unlink()
    message = f"{tmp_path} does not hold {name}; expected {folder.name} with .*; fetch the files"
    with pytest.raises(UserError, match=message):
        load(tmp_path, name)


@pytest.mark.parametrize("length", [0, 1, 3072, 3073 + 3072, 3073 * 10**9])
def test_a_binary_file_of_a_wrong_length(tmp_path, length):
    """The longest takes no room on the disk, and is refused before it takes any in memory."""
    path = write_binary(tmp_path, "cifar10") / "data_batch_3.bin"
    os.truncate(path, length)
    message = f"{path} is damaged: it has {length:,} bytes, expected a multiple of 3,073.*fetch it"
    with pytest.raises(UserError, match=message):
        load(tmp_path, "cifar10")


def test_labels_out_of_range(tmp_path):
    path = write_binary(tmp_path, "cifar10") / "data_batch_3.bin"
    path.write_bytes(bytes([10]) + path.read_bytes()[1:])
    with pytest.raises(UserError, match=f"{path} has the label 10, expected 0 … 9"):
        load(tmp_path, "cifar10")


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["first", "last", "meta"])
def test_code_in_a_pickle_does_not_run(tmp_path, publish, name, where):
    kind = VERSIONS[name].python
    folder = write_python(tmp_path, name)
    publish(folder, name)
    load(tmp_path, name)
    file = {
        "first": kind.train_list[0][0],
        "last": kind.test_list[-1][0],
        "meta": kind.meta["filename"],
    }[where]
    content = pickled(name, range(3), extra=Runs(tmp_path / "trace"))
    (folder / file).write_bytes(content)
    message = (
        rf"data\.root: {tmp_path} does not hold {name} \({folder.name} there lacks .* the "
        r"published MD5 sums\); .* fetch the files again"
    )
    with pytest.raises(UserError, match=message):
        load(tmp_path, name)
    assert not (tmp_path / "trace").exists()
    pickle.loads(content)  # the attack would have worked
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_that_are_not_the_published_ones(tmp_path, name):
    """Against the MD5 sums that torchvision really has."""
    write_python(tmp_path, name)
    with pytest.raises(UserError, match="lacks readable files with the published MD5 sums"):
        load(tmp_path, name)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(cifar, "CACHE_FOLDER", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_is_downloaded_once(cache, tmp_path, publish, monkeypatch, name):
    calls = []

    def download(self):
        calls.append(self.root)
        write_python(cache, name)

    publish(write_python(tmp_path / "published", name), name)
    monkeypatch.setattr(VERSIONS[name].python, "download", download)
    with pytest.raises(UserError, match=r"data\.download=true fetches it"):
        load(None, name, download=False)
    assert not calls
    for _ in range(2):
        assert len(targets(load(None, name).test)) == 4
    assert calls == [str(cache)]


def test_a_binary_version_in_the_cache_is_read(cache, monkeypatch):
    monkeypatch.setattr(VERSIONS["cifar10"].python, "download", None)
    write_binary(cache, "cifar10")
    assert len(targets(load(None, "cifar10").test)) == 4


def test_a_failed_download_says_what_to_do(cache, monkeypatch):
    def download(self):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(VERSIONS["cifar10"].python, "download", download)
    message = r"cifar-10-python\.tar\.gz could not be downloaded .*\(Network is .*set data\.root"
    with pytest.raises(UserError, match=message):
        load(None, "cifar10")


def test_a_given_folder_is_never_downloaded_into(tmp_path, monkeypatch):
    monkeypatch.setattr(VERSIONS["cifar100"].python, "download", None)
    with pytest.raises(UserError, match="does not hold cifar100; expected"):
        load(tmp_path, "cifar100")


@pytest.mark.parametrize(
    ("name", "padding", "message"),
    [("cifar11", 0, "name must be one of cifar10, cifar100"), ("cifar10", -1, "crop_padding")],
)
def test_bad_values(tmp_path, name, padding, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, name, crop_padding=padding)


def test_a_limit_takes_the_first_training_images(tmp_path):
    write_binary(tmp_path, "cifar10")
    some = load(tmp_path, "cifar10", train_images=7)
    found = [t for x in (some.train, some.validation, some.calibration) for t in targets(x)]
    assert sorted(found) == sorted(label("cifar10", i) for i in range(7))
    assert some.fingerprint != load(tmp_path, "cifar10").fingerprint
