"""Fashion-MNIST: 60,000 + 10,000 images of 28 × 28 pixels in four IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from adq_train.data.base import CACHE_FOLDER, ImageData, Loading
from adq_train.data.in_memory import Augmentation, Limited, require_padding, split_in_memory
from adq_train.errors import UserError

# Where Debian's package dataset-fashion-mnist puts the files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)

MAX_VALUES = 100_000_000  # of one file: twice the largest of Fashion-MNIST's

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def read_idx(path: Path) -> Tensor:
    """Reads an IDX file of unsigned bytes, plain or gzipped.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the values. No more is unpacked than these
    numbers say.

    Raises:
        UserError: The file is not such a file, shorter or longer than it says, or says that it
            holds more than :data:`MAX_VALUES`.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
            shape = struct.unpack(f">{start[3]}I", file.read(4 * start[3]))
            announced = math.prod(shape)
            if start[:3] != b"\0\0\x08" or announced > MAX_VALUES:
                raise ValueError(f"it begins with {start!r} and the shape {shape}")
            values = np.frombuffer(file.read(announced + 1), np.uint8).reshape(shape)
    # What gzip, struct and numpy say of files that are cut off, damaged or something else.
    except (OSError, EOFError, zlib.error, struct.error, IndexError, ValueError) as error:
        raise UserError(
            f"data.root: {path} is not an intact IDX file of up to {MAX_VALUES:,} bytes ({error}); "
            "remove it and fetch it again"
        ) from error
    return torch.from_numpy(values.copy())


def find_files(root: Path) -> list[Path] | None:
    """The four files under ``root`` (or torchvision's folder in it), or None if one is missing."""
    for folder in (root, root / "FashionMNIST" / "raw"):
        found = [
            next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
            for name in FILES
        ]
        if all(found):
            return [path for path in found if path]
    return None


def download(root: Path) -> None:
    """Lets torchvision fetch the files (with their checksums) into ``root``."""
    try:
        FashionMNIST(str(root), download=True)
    except Exception as error:  # whatever the network, the mirror or the disk came up with
        reason = getattr(error, "reason", error)  # urllib wraps it
        raise UserError(
            f"data.root: Fashion-MNIST could not be downloaded into {root} ({reason}); install "
            "Debian's package dataset-fashion-mnist, or set data.root to a folder with its four "
            "IDX files"
        ) from error


def locate(root: str | None, loading: Loading) -> list[Path]:
    """The files: under ``root`` when it is given, else Debian's, else a cache, else downloaded."""
    cache = CACHE_FOLDER.expanduser()
    if root is not None:
        found = find_files(Path(root))
    else:
        found = find_files(DEBIAN_FOLDER) or find_files(cache)
        if found is None:
            loading.require_download("fashion_mnist")
            download(cache)
            found = find_files(cache)
    if found is None:
        raise UserError(
            f"data.root: {root or cache} does not hold Fashion-MNIST; expected {', '.join(FILES)} "
            "there (or with .gz), or leave data.root out to look elsewhere"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class FashionMnist(Limited):
    """Fashion-MNIST from its IDX files.

    Attributes:
        root: Folder with the four files; None looks in Debian's folder, then downloads.
        crop_padding: Random shift in pixels.
        flip: Random mirror images.
    """

    root: str | None
    crop_padding: int
    flip: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        require_padding(self.crop_padding, 28)

    def load(self, loading: Loading) -> ImageData:
        """Finds and reads the files.

        Raises:
            UserError: They are missing, damaged, or do not belong together.
        """
        tensors = [read_idx(path) for path in locate(self.root, loading)]
        for images, targets in (tensors[:2], tensors[2:]):
            fit = images.dim() == 3 and images.numel() and targets.shape == images.shape[:1]
            if not fit or (targets > 9).any():
                raise UserError(
                    f"data.root: images of shape {tuple(images.shape)} and labels of shape "
                    f"{tuple(targets.shape)} do not belong together, or a label is beyond 9; "
                    "fetch the files again"
                )
        return split_in_memory(
            "fashion_mnist",
            self.limit(tensors[0].unsqueeze(1), tensors[1].long()),
            (tensors[2].unsqueeze(1), tensors[3].long()),
            num_classes=10,
            held_out=self,
            augmentation=Augmentation(self.crop_padding, self.flip),
            loading=loading,
            class_names=CLASSES,
        )
