import builtins
import io
import os
import pickle
import re
import resource
import shutil
import struct
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_train.data import cifar
from adq_train.data.base import Loading
from adq_train.data.cifar import LAYOUTS, Cifar, read_binary, read_pickled
from adq_train.errors import UserError

NAMES = list(LAYOUTS)


def pixel(image, channel, row, column):
    return (image * 37 + channel * 101 + row * 5 + column * 3) % 256


def flat(image):
    """The published order: all of red row by row, then green, then blue."""
    side = range(32)
    return bytes(pixel(image, c, y, x) for c in range(3) for y in side for x in side)


def check_pixels(found, numbers):
    assert (found.shape, found.dtype) == ((len(numbers), 3, 32, 32), torch.uint8)
    for position, image in enumerate(numbers):
        for channel, row, column in ((0, 0, 0), (0, 0, 31), (1, 31, 0), (2, 7, 19)):
            expected = pixel(image, channel, row, column)
            assert found[position, channel, row, column] == expected


def label(name, image):
    return image % LAYOUTS[name].num_classes


def binary(name, numbers):
    """Records of the binary version; CIFAR-100 has a coarse label before the fine one."""
    coarse = [b"\x13"] if name == "cifar100" else [b""]
    return b"".join(part for i in numbers for part in (*coarse, bytes([label(name, i)]), flat(i)))


def python2(name, numbers):
    """The python version as Python 2 wrote it: protocol 2, where text is a string of bytes."""

    def string(content):
        return b"T" + struct.pack("<i", len(content)) + content

    def integer(value):
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    array += integer(0) + b"\x85" + string(b"b") + b"\x87R("
    array += integer(1) + integer(len(numbers)) + integer(3072) + b"\x86" + dtype
    array += b"\x89" + string(b"".join(flat(i) for i in numbers)) + b"tb"
    fine = b"](" + b"".join(integer(label(name, i)) for i in numbers) + b"e"
    coarse = b"](" + integer(7) * len(numbers) + b"e"
    key = LAYOUTS[name].label_key.encode()
    items = string(b"data") + array + string(key) + fine + string(b"coarse_labels") + coarse
    return b"\x80\x02}(" + items + b"u."


def python3(name, numbers, protocol=4):
    rows = np.array([list(flat(i)) for i in numbers], np.uint8)
    labels = [label(name, i) for i in numbers]
    content = {"data": rows, LAYOUTS[name].label_key: labels, "coarse_labels": [7] * len(numbers)}
    return pickle.dumps(content, protocol=protocol)


FORMATS = {
    "binary": (0, ".bin", binary),
    "python 2": (1, "", python2),
    "python 3": (1, "", python3),
}


def write(root, name, form="binary", in_root=False):
    """A small version of the whole set; images are numbered through, the test part from 90."""
    index, suffix, make = FORMATS[form]
    layout = LAYOUTS[name]
    folder = root if in_root else root / layout.folders[index]
    folder.mkdir(parents=True, exist_ok=True)
    for part, file in enumerate(layout.train):
        numbers = range(3 * part, 3 * part + 3) if name == "cifar10" else range(15)
        (folder / f"{file}{suffix}").write_bytes(make(name, numbers))
    (folder / f"{layout.test}{suffix}").write_bytes(make(name, range(90, 94)))
    return folder


def load(root, name, **changes):
    knobs = {"validation_images": 2, "calibration_images": 1, "crop_padding": 0, "flip": False}
    data_set = Cifar(name=name, root=None if root is None else str(root), **{**knobs, **changes})
    return data_set.load(Loading(4, 4, 0, torch.device("cpu")))


def targets(batches):
    return torch.cat([t for _, t in batches.epoch(0)]).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_binary_records(tmp_path, name):
    path = tmp_path / "x.bin"
    path.write_bytes(binary(name, [5, 93, 8]))
    images, labels = read_binary(path, LAYOUTS[name].label_bytes)
    check_pixels(images, [5, 93, 8])
    assert labels.tolist() == [label(name, i) for i in (5, 93, 8)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "make",
    [python2, python3, lambda *a: python3(*a, protocol=2), lambda *a: python3(*a, protocol=5)],
    ids=["python 2", "protocol 4", "protocol 2", "protocol 5"],
)
def test_pickled_files(tmp_path, name, make):
    path = tmp_path / "x"
    path.write_bytes(make(name, [5, 93, 8]))
    images, labels = read_pickled(path, LAYOUTS[name].label_key)
    check_pixels(images, [5, 93, 8])
    assert labels.tolist() == [label(name, i) for i in (5, 93, 8)]


def test_the_files_made_here_are_what_pickle_itself_reads():
    content = pickle.loads(python2("cifar10", [5, 93]), encoding="bytes")
    assert content[b"labels"] == [5, 3]
    assert content[b"data"].tolist() == [list(flat(5)), list(flat(93))]


def test_arrays_in_column_order_and_keys_of_bytes(tmp_path):
    rows = np.asfortranarray(np.array([list(flat(i)) for i in (5, 93)], np.uint8))
    path = tmp_path / "x"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps({b"data": rows, b"labels": [5, 3]}, protocol))
        images, labels = read_pickled(path, "labels")
        check_pixels(images, [5, 93])
        assert labels.tolist() == [5, 3]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("in_root", [False, True])
def test_load(tmp_path, name, form, in_root):
    write(tmp_path, name, form, in_root)
    data = load(tmp_path, name)
    assert (data.name, data.image_shape) == (name, (3, 32, 32))
    assert data.num_classes == LAYOUTS[name].num_classes
    assert targets(data.test) == [label(name, i) for i in range(90, 94)]
    every = [*targets(data.train), *targets(data.validation), *targets(data.calibration)]
    assert sorted(every) == sorted(label(name, i) for i in range(15))


@pytest.mark.parametrize("name", NAMES)
def test_both_versions_are_the_same_data(tmp_path, name):
    for form in FORMATS:
        write(tmp_path / form, name, form)
    assert len({load(tmp_path / form, name).fingerprint for form in FORMATS}) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["binary", "python 3"])
def test_a_missing_file(tmp_path, name, form):
    folder = write(tmp_path, name, form)
    next(folder.glob(f"{LAYOUTS[name].test}*")).unlink()
    message = f"{tmp_path} does not hold {name}; expected .*{LAYOUTS[name].folders[0]}"
    with pytest.raises(UserError, match=message):
        load(tmp_path, name)


@pytest.mark.parametrize("length", [0, 1, 3072, 3073 + 3072])
def test_a_truncated_binary_file(tmp_path, length):
    path = write(tmp_path, "cifar10") / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=f"{path} is truncated: {length} bytes.*fetch the file"):
        load(tmp_path, "cifar10")


@pytest.mark.parametrize("make", [python2, python3])
def test_a_truncated_pickled_file(tmp_path, make):
    path = tmp_path / "x"
    whole = make("cifar10", [1, 2])
    for length in (*range(300), 3000, *range(len(whole) - 100, len(whole))):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{path} is not an intact CIFAR file.*fetch the file"):
            read_pickled(path, "labels")


@settings(deadline=None, max_examples=300)
@given(data=st.data(), form=st.sampled_from(["python 2", "python 3"]), value=st.integers(0, 255))
def test_a_damaged_pickled_file_is_refused_or_has_the_right_shape(
    tmp_path_factory, data, form, value
):
    content = bytearray(FORMATS[form][2]("cifar10", [1]))
    # Around the pixels: what describes the array.
    places = [i for i in range(len(content)) if i < 250 or i > len(content) - 120]
    content[data.draw(st.sampled_from(places))] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        images, labels = read_pickled(path, "labels")
    except UserError:
        return
    assert (images.shape, labels.shape) == ((1, 3, 32, 32), (1,))


def array(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"labels": [1]},
        {"data": array(1, 3072)},
        {"data": array(2, 3072), "labels": [1]},
        {"data": array(0, 3072), "labels": []},
        {"data": array(1, 3071), "labels": [1]},
        {"data": array(1, 3072, dtype=np.int64), "labels": [1]},
        {"data": array(1, 3072), "labels": ["frog"]},
        {"data": array(1, 3072), "labels": [2**80]},
        {"data": "frog", "labels": [1]},
    ],
    ids=["list", "no data", "no labels", "count", "empty", "size", "type", "text", "large", "word"],
)
def test_a_pickled_file_of_something_else(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=f"{path} is not an intact CIFAR file"):
        read_pickled(path, "labels")


@pytest.mark.parametrize("form", FORMATS)
def test_labels_out_of_range(tmp_path, monkeypatch, form):
    monkeypatch.setitem(globals(), "label", lambda name, image: 10 if image == 7 else 1)
    folder = write(tmp_path, "cifar10", form)
    with pytest.raises(UserError, match=f"{folder}/data_batch_3.* labels outside 0 … 9"):
        load(tmp_path, "cifar10")


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "attack",
    [
        lambda path: Runs(os.system, f"touch {path}"),
        lambda path: Runs(builtins.eval, f"open({str(path)!r}, 'w')"),
        lambda path: Runs(os.mkdir, str(path)),
    ],
    ids=["os.system", "eval", "os.mkdir"],
)
def test_code_in_a_pickle_does_not_run(tmp_path, attack, protocol):
    trace, path = tmp_path / "trace", tmp_path / "x"
    rows = np.array([list(flat(1))], np.uint8)
    content = pickle.dumps({"x": attack(trace), "data": rows, "labels": [1]}, protocol)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"it names \w+\.\w+, which no image file needs"):
        read_pickled(path, "labels")
    assert not trace.exists()
    pickle.loads(content)  # the attack would have worked
    assert trace.exists()


def test_an_array_of_made_up_pointers_is_refused(tmp_path):
    path = tmp_path / "x"
    forged = Runs(np.ndarray, (3072,), np.dtype("O"), b"A" * 8 * 3072)
    path.write_bytes(pickle.dumps({"data": forged, "labels": [1]}, 4))
    with pytest.raises(UserError, match="not an intact CIFAR file"):
        read_pickled(path, "labels")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(cifar, "CACHE_FOLDER", tmp_path / "cache")
    return tmp_path / "cache"


def replace_download(monkeypatch, function):
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", function)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_is_downloaded_once(cache, monkeypatch, name):
    calls = []

    def download(url, root, file, md5):
        calls.append((url, root, md5))
        write(cache / "made", name)
        with tarfile.open(cache / file, "w:gz") as archive:
            archive.add(cache / "made", "somewhere")
        shutil.rmtree(cache / "made")

    replace_download(monkeypatch, download)
    for _ in range(2):
        assert len(targets(load(None, name).test)) == 4
    assert calls == [(LAYOUTS[name].url, str(cache), LAYOUTS[name].md5)]
    assert re.fullmatch("[0-9a-f]{32}", calls[0][2])


def test_a_failed_download_says_what_to_do(cache, monkeypatch):
    def download(*_):
        raise OSError("Network is unreachable")

    replace_download(monkeypatch, download)
    message = r"cifar-10-binary\.tar\.gz could not be downloaded \(Network is .*set data\.root"
    with pytest.raises(UserError, match=message):
        load(None, "cifar10")


def test_a_download_without_the_files(cache, monkeypatch):
    def download(url, root, file, md5):
        cache.mkdir()
        tarfile.open(cache / file, "w:gz").close()

    replace_download(monkeypatch, download)
    with pytest.raises(UserError, match="does not hold cifar10"):
        load(None, "cifar10")


def test_an_archive_cannot_lead_out_of_its_folder(tmp_path):
    """Paths upwards and from the root, a link to a file and one to a folder, a device."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"before")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:

        def add(name, content=b"evil", **fields):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))

        add("../secret")
        add(str(secret))
        add("../../test.bin", b"plain")
        add("train.bin", b"", type=tarfile.SYMTYPE, linkname=str(secret))
        add("train.bin/secret")
        add("train.bin", b"", type=tarfile.LNKTYPE, linkname="../secret")
        add("train.bin", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
    cifar.unpack(tmp_path / "evil.tar", tmp_path / "a" / "b", ["train.bin", "test.bin"])
    assert secret.read_bytes() == b"before"
    found = {str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()}
    assert found == {"secret", "evil.tar", "a/b/test.bin"}
    assert (tmp_path / "a/b/test.bin").read_bytes() == b"plain"


def test_a_given_folder_is_never_downloaded_into(tmp_path, monkeypatch):
    replace_download(monkeypatch, None)
    with pytest.raises(UserError, match="does not hold cifar100"):
        load(tmp_path, "cifar100")


@pytest.mark.parametrize(
    ("name", "padding", "message"),
    [("cifar11", 0, "name must be one of cifar10, cifar100"), ("cifar10", -1, "crop_padding")],
)
def test_bad_values(tmp_path, name, padding, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, name, crop_padding=padding)


def test_a_limit_takes_the_first_training_images(tmp_path):
    write(tmp_path, "cifar10")
    some = load(tmp_path, "cifar10", train_images=7)
    found = [t for x in (some.train, some.validation, some.calibration) for t in targets(x)]
    assert sorted(found) == sorted(label("cifar10", i) for i in range(7))
    assert some.fingerprint != load(tmp_path, "cifar10").fingerprint


def test_a_pickle_takes_no_more_memory_than_its_file(tmp_path):
    path = tmp_path / "x"
    text = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x00"
    encode = b"c_codecs\nencode\nq\x01"
    again = b"h\x01h\x00X\x06\0\0\0latin1\x86R"
    for name, content in (
        ("a table as long as it says", b"\x80\x02Nr" + struct.pack("<I", 2**28) + b"."),
        ("one text, encoded often", b"\x80\x02](" + encode + text + again * 500 + b"e."),
    ):
        path.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match="not an intact CIFAR file"):
            read_pickled(path, "labels")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 200_000, f"{name}: {grown} kB"


@pytest.mark.parametrize("form", ["binary", "python 3"])
def test_a_file_beyond_the_limit_is_not_read(tmp_path, form):
    folder = write(tmp_path, "cifar10", form)
    path = next(folder.glob("data_batch_2*"))
    os.truncate(path, 3073 * 10**9)  # takes no room on the disk
    with pytest.raises(UserError, match=r"data_batch_2.* has 3,073,000,000,000 bytes and at most"):
        load(tmp_path, "cifar10")
