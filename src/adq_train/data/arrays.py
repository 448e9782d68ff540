"""Images of one size and their classes as NumPy arrays in one ``.npz`` file."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adq_train.data.base import Amount, ImageData, Loading, check_amount, set_aside
from adq_train.data.in_memory import Augmentation, Limited, require_padding, split_in_memory
from adq_train.data.pictures import shown
from adq_train.errors import UserError

MAX_BYTES = 8_000_000_000  # of all arrays, unpacked; as float32 a batch takes four times its part
# How others call them: images and labels of each part.
NAMES = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"),
              ("x", "y")),
    "val": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}  # fmt: skip

Array = NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Arrays(Limited):
    """Images and classes in a ``.npz`` file.

    Attributes:
        root: The file. Its arrays are called ``x_train`` and ``y_train``, or ``train_images`` and
            ``train_labels``, or ``images`` and ``labels``; those of ``val`` and ``test`` alike,
            where they are there. Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or
            3, in 0 … 255, or floats in 0 … 1; classes are whole numbers or texts, (N,) or (N, 1).
        test_images: How many, or which share, to set aside where there is no part for testing.
        crop_padding: Random shift in pixels.
        flip: Random mirror images.
    """

    root: str
    test_images: Amount = "0.2x"
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount("test_images", self.test_images)
        Augmentation(self.crop_padding, self.flip)

    def load(self, loading: Loading) -> ImageData:
        """Reads the file.

        Raises:
            UserError: It cannot be read, or holds something else.
        """
        arrays = read_arrays(Path(self.root))
        found = {part: self._pair(arrays, part) for part in NAMES}
        train = found["train"]
        if train is None:
            raise UserError(
                f"data.root: {shown(self.root)} holds {', '.join(arrays) or 'nothing'}; expected "
                "images and labels, or x_train and y_train"
            )
        names = np.unique(train[1])
        tensors = {
            part: (images_of(pair[0]), targets_of(pair[1], names))
            for part, pair in found.items()
            if pair is not None
        }
        images, targets = tensors["train"]
        require_padding(self.crop_padding, min(images.shape[2:]))
        test = tensors.get("test")
        if test is None:
            aside, rest = set_aside(self.test_images, len(images))
            test, images, targets = (images[aside], targets[aside]), images[rest], targets[rest]
        return split_in_memory(
            "arrays",
            self.limit(images, targets),
            test,
            num_classes=len(names),
            held_out=self,
            augmentation=Augmentation(self.crop_padding, self.flip),
            loading=loading,
            class_names=tuple(map(str, names)),
            validation=tensors.get("val"),
        )

    def _pair(self, arrays: dict[str, Array], part: str) -> tuple[Array, Array] | None:
        """Images and labels of a part.

        Raises:
            UserError: One is there without the other, or they do not belong together.
        """
        for names in NAMES[part]:
            both = [arrays[name] for name in names if name in arrays]
            if len(both) == 1:
                raise UserError(f"data.root: {shown(self.root)} has one of {' and '.join(names)}")
            if both:
                images, labels = both[0], both[1]
                labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
                if labels.ndim != 1 or len(labels) != len(images) or not len(images):
                    raise UserError(
                        f"data.root: {names[0]} {images.shape} and {names[1]} {both[1].shape} do "
                        "not belong together; there must be one label for each image"
                    )
                return images, labels
        return None


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a ``.npz`` file, without running code of it.

    Raises:
        UserError: It cannot be read, is too large, or holds objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(x.file_size for x in archive.infolist())
        if size > MAX_BYTES:
            raise UserError(
                f"data.root: {shown(path)} unpacks to {size / 1e9:,.1f} GB, and at most "
                f"{MAX_BYTES / 1e9:g} GB are allowed; write image files instead (data=folder)"
            )
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if _is_known(name, NAMES.values())}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(
            f"data.root: {shown(path)} cannot be read ({' '.join(str(error).split())}); write it "
            "with numpy.savez_compressed"
        ) from error


def _is_known(name: str, parts: Collection[tuple[tuple[str, str], ...]]) -> bool:
    return any(name in pair for names in parts for pair in names)


def images_of(array: Array) -> Tensor:
    """Images as (N, C, H, W) uint8.

    Raises:
        UserError: Their shape or their values have no known meaning.
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = np.moveaxis(array, 3, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise UserError(
            f"data.root: images of shape {array.shape}; expected (N, H, W), (N, H, W, C) or "
            "(N, C, H, W) with C = 1 or 3"
        )
    low, high = array.min(), array.max()
    is_float = np.issubdtype(array.dtype, np.floating)
    if is_float and float(low) >= 0 and float(high) <= 1:  # false for NaN
        array = np.rint(array * 255)
    elif is_float or not np.issubdtype(array.dtype, np.integer) or not 0 <= low <= high <= 255:
        raise UserError(
            f"data.root: images of {array.dtype} from {low:g} to {high:g}; expected whole numbers "
            "in 0 … 255 or floats in 0 … 1"
        )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8))


def targets_of(labels: Array, names: Array) -> Tensor:
    """The number of each label's class, (N,) int64.

    Raises:
        UserError: A label is no whole number or text, or not among those of training.
    """
    if not (np.issubdtype(labels.dtype, np.integer) or labels.dtype.kind in "US"):
        raise UserError(f"data.root: labels of {labels.dtype}; expected whole numbers or texts")
    unknown = np.setdiff1d(labels, names)
    if len(unknown):
        raise UserError(f"data.root: no training image has the label {unknown[0]}")
    return torch.from_numpy(np.searchsorted(names, labels).astype(np.int64))
