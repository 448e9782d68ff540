"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32 × 32 pixels.

The binary version is read here. Everything else is torchvision's: the download, and the "python
version", whose files are pickles. torchvision opens none before the MD5 sums of all of them, and
later that of the class names, are the published ones: a pickle of somebody else never runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from adq_train.data.base import CACHE_FOLDER, ImageData, Loading
from adq_train.data.in_memory import Augmentation, Limited, require_padding, split_in_memory
from adq_train.errors import UserError

MAX_BYTES = 1_000_000_000  # of one file: six times the largest of CIFAR's

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class Version:
    """What differs between the two sets.

    Attributes:
        python: torchvision's class; it knows the names of the files, their MD5 sums and the URL.
        binary_folder: Where the binary version unpacks to.
        label_bytes: Bytes before the pixels of a binary record; the last one is the class.
        class_names: One per class.
    """

    python: Any  # a class of torchvision, which has no types
    binary_folder: str
    label_bytes: int
    class_names: tuple[str, ...]

    @property
    def binary_files(self) -> list[str]:
        """The names of the training files, then that of the test file."""
        return [f"{name}.bin" for name, _ in self.python.train_list + self.python.test_list]


VERSIONS = {
    "cifar10": Version(CIFAR10, "cifar-10-batches-bin", 1, tuple(CIFAR10_CLASSES.split())),
    "cifar100": Version(CIFAR100, "cifar-100-binary", 2, tuple(CIFAR100_CLASSES.split())),
}


def read_binary(path: Path, label_bytes: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Reads records of label bytes and 3 × 32 × 32 pixels, channel by channel.

    Returns:
        Images (M, 3, 32, 32) uint8 and targets (M,) int64, the last label byte of each record.

    Raises:
        UserError: The file is empty, ends inside a record or is too large, or a label is.
    """
    record = label_bytes + 3 * 32 * 32
    try:
        size = path.stat().st_size
        if size % record or not 0 < size <= MAX_BYTES:
            raise UserError(
                f"data.root: {path} is damaged: it has {size:,} bytes, expected a multiple of "
                f"{record:,} (a record) up to {MAX_BYTES:,}; remove it and fetch it again"
            )
        records = torch.from_numpy(np.fromfile(path, np.uint8)).view(-1, record)
    except OSError as error:
        raise UserError(f"data.root: cannot read {path} ({error.strerror})") from error
    targets = records[:, label_bytes - 1].long()
    if targets.max() >= num_classes:
        raise UserError(
            f"data.root: {path} has the label {targets.max()}, expected 0 … {num_classes - 1}; "
            "remove it and fetch it again"
        )
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), targets


def read_python(root: Path, version: Version) -> list[tuple[Tensor, Tensor]]:
    """Lets torchvision check and read the python version: the training part, then the test part.

    Raises:
        RuntimeError: A file is missing, or its MD5 sum is not the published one.
        OSError: A file cannot be read.
    """
    parts = [version.python(str(root), train=train) for train in (True, False)]
    # torchvision gives (M, 32, 32, 3).
    return [
        (torch.from_numpy(part.data.transpose(0, 3, 1, 2)), torch.tensor(part.targets))
        for part in parts
    ]


def download(root: Path, version: Version) -> None:
    """Lets torchvision fetch the python version, checked against its published MD5 sums."""
    try:
        version.python(str(root), download=True)
    except Exception as error:  # whatever the network, the mirror or the disk came up with
        reason = getattr(error, "reason", error)  # urllib wraps it
        raise UserError(
            f"data.root: {version.python.url} could not be downloaded into {root} ({reason}); "
            "fetch it elsewhere, unpack it and set data.root to the folder that holds it"
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
        if self.name not in VERSIONS:
            raise ValueError(f"name must be one of {', '.join(VERSIONS)}, got {self.name!r}")
        require_padding(self.crop_padding, 32)

    def load(self, loading: Loading) -> ImageData:
        """Finds (or downloads) and reads the files.

        Raises:
            UserError: They are missing or damaged.
        """
        class_names = VERSIONS[self.name].class_names
        train, test = self._read(loading)
        return split_in_memory(
            self.name,
            self.limit(*train),
            test,
            num_classes=len(class_names),
            held_out=self,
            augmentation=Augmentation(self.crop_padding, self.flip),
            loading=loading,
            class_names=class_names,
        )

    def _read(self, loading: Loading) -> list[tuple[Tensor, Tensor]]:
        """The training part and the test part, from whichever version is there."""
        version = VERSIONS[self.name]
        root = CACHE_FOLDER.expanduser() if self.root is None else Path(self.root)
        for folder in (root, root / version.binary_folder):
            files = [folder / name for name in version.binary_files]
            if all(file.is_file() for file in files):
                num_classes = len(version.class_names)
                *train, test = (read_binary(x, version.label_bytes, num_classes) for x in files)
                images, targets = zip(*train, strict=True)
                return [(torch.cat(images), torch.cat(targets)), test]
        try:
            return read_python(root, version)
        except (RuntimeError, OSError) as error:
            if self.root is not None:
                python = version.python.base_folder
                differs = f" ({python} there lacks readable files with the published MD5 sums)"
                raise UserError(
                    f"data.root: {root} does not hold {self.name}"
                    f"{differs * (root / python).is_dir()}; expected "
                    f"{version.binary_folder} with {', '.join(version.binary_files)}, or "
                    f"torchvision's {python}; fetch the files again, or leave data.root out to "
                    "download them"
                ) from error
        loading.require_download(self.name)
        download(root, version)
        return read_python(root, version)
