"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32 × 32 pixels.

The binary version is read, and downloaded where nothing is there. The folder that torchvision
leaves behind (the "python version") is read too; its files are pickles, so they go through an
unpickler that takes down numpy arrays and can build nothing else.
"""

from __future__ import annotations

import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adq_train.data.base import ImageData, Loading
from adq_train.data.in_memory import Augmentation, Limited, require_padding, split_in_memory
from adq_train.errors import UserError
from adq_train.storage.files import written_whole

CACHE_FOLDER = Path("~/.cache/adq-train")
PIXELS = 3 * 32 * 32
MAX_BYTES = 1_000_000_000  # of one file: six times the largest of CIFAR's


@dataclass(frozen=True)
class Layout:
    """Where one of the two sets keeps its files.

    Attributes:
        folders: Folder of the binary and of the python version.
        train: Names of the training files, without suffix.
        test: Name of the test file.
        label_bytes: Bytes before the pixels of a binary record; the last one is the class.
        label_key: Key of the classes in a pickled file.
        num_classes: Number of classes.
        url: The archive of the binary version.
        md5: Its published checksum.
        class_names: One per class.
    """

    folders: tuple[str, str]
    train: tuple[str, ...]
    test: str
    label_bytes: int
    label_key: str
    num_classes: int
    url: str
    md5: str
    class_names: tuple[str, ...]


CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer",
    "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver",
    "bed", "bee", "beetle", "bicycle", "bottle",
    "bowl", "boy", "bridge", "bus", "butterfly",
    "camel", "can", "castle", "caterpillar", "cattle",
    "chair", "chimpanzee", "clock", "cloud", "cockroach",
    "couch", "crab", "crocodile", "cup", "dinosaur",
    "dolphin", "elephant", "flatfish", "forest", "fox",
    "girl", "hamster", "house", "kangaroo", "keyboard",
    "lamp", "lawn_mower", "leopard", "lion", "lizard",
    "lobster", "man", "maple_tree", "motorcycle", "mountain",
    "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
    "plain", "plate", "poppy", "porcupine", "possum",
    "rabbit", "raccoon", "ray", "road", "rocket",
    "rose", "sea", "seal", "shark", "shrew",
    "skunk", "skyscraper", "snail", "snake", "spider",
    "squirrel", "streetcar", "sunflower", "sweet_pepper", "table",
    "tank", "telephone", "television", "tiger", "tractor",
    "train", "trout", "tulip", "turtle", "wardrobe",
    "whale", "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
LAYOUTS = {
    "cifar10": Layout(
        folders=("cifar-10-batches-bin", "cifar-10-batches-py"),
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        label_bytes=1,
        label_key="labels",
        num_classes=10,
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        class_names=CIFAR10_CLASSES,
    ),
    "cifar100": Layout(
        folders=("cifar-100-binary", "cifar-100-python"),
        train=("train",),
        test="test",
        label_bytes=2,
        label_key="fine_labels",
        num_classes=100,
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        class_names=CIFAR100_CLASSES,
    ),
}


def checked_size(path: Path) -> int:
    """The bytes of a file, before it is read.

    Raises:
        UserError: There are more than :data:`MAX_BYTES`.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(
            f"data.root: {path} has {size:,} bytes and at most {MAX_BYTES:,} are read; fetch the "
            "file again"
        )
    return size


def read_binary(path: Path, label_bytes: int) -> tuple[Tensor, Tensor]:
    """Reads records of label bytes and 3 × 32 × 32 pixels, channel by channel.

    Returns:
        Images (M, 3, 32, 32) uint8 and targets (M,) int64, the last label byte of each record.

    Raises:
        UserError: The file is empty or ends inside a record.
    """
    size, record = checked_size(path), label_bytes + PIXELS
    if size == 0 or size % record:
        raise UserError(
            f"data.root: {path} is truncated: {size} bytes are not a multiple of the "
            f"{record} bytes of a record; fetch the file again"
        )
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"data.root: cannot read {path} ({error.strerror})") from error
    records = torch.from_numpy(data).view(-1, record)
    targets = records[:, label_bytes - 1].long()
    return records[:, label_bytes:].reshape(-1, 3, 32, 32).contiguous(), targets


class _Dtype:
    """Takes down the arguments of a pickled ``numpy.dtype``."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and the like; bytes have none."""


class _Array:
    """Takes down a pickled array: numpy's own way back trusts the file, and crashes on damage."""

    def __init__(self, raw: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> None:
        self.raw, self.dtype, self.shape, self.order = raw, dtype, shape, order

    @classmethod
    def empty(cls, *_: object) -> _Array:
        """What ``_reconstruct`` gives before its state is set."""
        return cls(b"", _Dtype("u1"), (0,), "C")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, is_fortran, self.raw = state
        self.order = "F" if is_fortran else "C"

    def pixels(self) -> np.ndarray[Any, Any]:
        """The array, which must hold bytes."""
        if self.dtype.code not in ("u1", "|u1"):
            raise ValueError(f"its pixels are {self.dtype.code}, not bytes")
        raw = self.raw.encode("latin1") if isinstance(self.raw, str) else self.raw
        values = np.frombuffer(raw, np.uint8)
        return values.reshape(self.shape, order=self.order).reshape(-1, 3, 32, 32)


class _ArrayUnpickler(pickle._Unpickler):
    """Takes down numpy arrays; every other name in the file is refused.

    In Python, not in C: there a few bytes make the table of known objects as long as they say.
    Nothing is made larger than the file has it; so text becomes bytes only where it is the pixels.
    """

    STAND_INS: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): lambda text, _: text,
        **{
            (f"numpy.{core}.{module}", name): stand_in
            for core in ("core", "_core")
            for module, name, stand_in in (
                ("multiarray", "_reconstruct", _Array.empty),
                ("numeric", "_frombuffer", _Array),
            )
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no image file needs")
        return self.STAND_INS[module, name]


def read_pickled(path: Path, label_key: str) -> tuple[Tensor, Tensor]:
    """Reads a file of the python version: a dictionary with pixels (M, 3072) and labels.

    Raises:
        UserError: The file is damaged, is something else, or tries to load anything but arrays.
    """
    checked_size(path)
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        # Python 2 wrote text keys, Python 3 may have written bytes.
        fields = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        pixels = torch.tensor(fields["data"].pixels())
        targets = torch.tensor(fields[label_key], dtype=torch.int64)
        if not 0 < len(pixels) == len(targets):
            raise ValueError(f"it holds {len(pixels)} images and {len(targets)} labels")
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(
            f"data.root: {path} is not an intact CIFAR file ({error}); fetch the file again"
        ) from error
    return pixels, targets


def find_reader(
    root: Path, layout: Layout
) -> tuple[list[Path], Callable[[Path], tuple[Tensor, Tensor]]] | None:
    """The training files, then the test file, with their reader; None where a file is missing."""
    binary, pickled = layout.folders
    names = (*layout.train, layout.test)
    for folder in (root, root / binary):
        files = [folder / f"{name}.bin" for name in names]
        if all(file.is_file() for file in files):
            return files, lambda path: read_binary(path, layout.label_bytes)
    for folder in (root, root / pickled):
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files, lambda path: read_pickled(path, layout.label_key)
    return None


def unpack(archive: Path, folder: Path, names: Iterable[str]) -> None:
    """Takes some files out of an archive.

    Only the last part of a member's name counts, and only plain files do: no path or link in the
    archive can lead out of the folder.

    Args:
        archive: A tar file, compressed or not.
        folder: Where they go; made where it is missing.
        names: Of the files; others stay in the archive.
    """
    wanted = set(names)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as members:
        for member in members:
            name = PurePosixPath(member.name).name
            content = members.extractfile(member) if member.isreg() else None
            if content is not None and name in wanted:
                with written_whole(folder / name) as temporary, temporary.open("wb") as file:
                    shutil.copyfileobj(content, file)


def download(root: Path, layout: Layout) -> None:
    """Fetches and unpacks the binary version, checked against its published MD5."""
    from torchvision.datasets.utils import download_url

    archive = layout.url.rpartition("/")[2]
    try:
        download_url(layout.url, str(root), archive, layout.md5)
        names = [f"{name}.bin" for name in (*layout.train, layout.test)]
        unpack(root / archive, root / layout.folders[0], names)
    except Exception as error:  # whatever the network, the mirror or the disk came up with
        raise UserError(
            f"data.root: {layout.url} could not be downloaded ({error}); fetch it elsewhere, "
            "unpack it and set data.root to the folder that holds it"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Cifar(Limited):
    """CIFAR-10 or CIFAR-100.

    Attributes:
        name: ``cifar10`` or ``cifar100``.
        root: Folder that holds either version; None uses a cache and downloads into it.
        crop_padding: Random shift in pixels.
        flip: Random mirror images.
    """

    name: str
    root: str | None
    crop_padding: int
    flip: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in LAYOUTS:
            raise ValueError(f"name must be one of {', '.join(LAYOUTS)}, got {self.name!r}")
        require_padding(self.crop_padding, 32)

    def load(self, loading: Loading) -> ImageData:
        """Finds (or downloads) and reads the files.

        Raises:
            UserError: They are missing or damaged.
        """
        layout = LAYOUTS[self.name]
        folder = CACHE_FOLDER.expanduser() if self.root is None else Path(self.root)
        found = find_reader(folder, layout)
        if found is None and self.root is None:
            loading.require_download(self.name)
            download(folder, layout)
            found = find_reader(folder, layout)
        if found is None:
            raise UserError(
                f"data.root: {folder} does not hold {self.name}; expected the folder "
                f"{layout.folders[0]} (or torchvision's {layout.folders[1]}), or leave data.root "
                "out to download it"
            )
        files, read = found
        parts = [read(path) for path in files]
        for path, (_, targets) in zip(files, parts, strict=True):
            if not 0 <= int(targets.min()) <= int(targets.max()) < layout.num_classes:
                raise UserError(
                    f"data.root: {path} has labels outside 0 … {layout.num_classes - 1}"
                )
        train_images, train_targets = zip(*parts[:-1], strict=True)
        return split_in_memory(
            self.name,
            self.limit(torch.cat(train_images), torch.cat(train_targets)),
            parts[-1],
            num_classes=layout.num_classes,
            held_out=self,
            augmentation=Augmentation(self.crop_padding, self.flip),
            loading=loading,
            class_names=layout.class_names,
        )
