"""What every data set gives to a run, and the seeds that make its order repeatable."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from adq_train.errors import UserError
from adq_train.shares import share

ALL = slice(None)
CACHE_FOLDER = Path("~/.cache/adq-train")  # what is downloaded
MAX_SIDE = 4096  # pixels, of what a model sees
MOST_CALIBRATION = 1024  # images, where a share is asked for: more cost time and tell no more
Amount = int | str  # a number of images, or a share such as 0.1x
Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) float32, normalised; targets (N,) int64


class Batches(Protocol):
    """Batches whose order and augmentation depend on the seed and the epoch alone."""

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        ...

    def size(self, index: int) -> int:
        """The number of images in the whole batch number ``index``."""
        ...

    def epoch(self, epoch: int, batches: slice = ALL, images: slice = ALL) -> Iterator[Batch]:
        """The batches of one epoch, on the training device.

        Args:
            epoch: From 0; decides on order and augmentation.
            batches: Which of them; the others cost nothing.
            images: Which images of each; a batch may be left without any.
        """
        ...


@dataclass(frozen=True)
class BatchPlan:
    """Which images of an epoch make which batch.

    Attributes:
        num_images: Of an epoch.
        batch_size: Of every batch but the last one.
        at_least: Fewer images than this are no batch of their own: the batch before takes them,
            if there is one. A batch norm over 1 × 1 pixels cannot train on a single image.
    """

    num_images: int
    batch_size: int
    at_least: int = 1

    def __len__(self) -> int:
        whole, left = divmod(self.num_images, self.batch_size)
        return whole + bool(left and (left >= self.at_least or not whole))

    def images(self, index: int) -> slice:
        """The positions in an epoch's order that batch ``index`` takes."""
        is_last = index == len(self) - 1
        start = index * self.batch_size
        return slice(start, self.num_images if is_last else start + self.batch_size)

    def size(self, index: int) -> int:
        """The number of images in batch ``index``."""
        images = self.images(index)
        return int(images.stop - images.start)


@dataclass(frozen=True)
class Pixels:
    """How the pixels of an image file become what a model sees.

    Attributes:
        mean: Per channel, in units of the data set's own pixel values.
        std: Per channel, in the same units.
        peak: The data set's largest pixel value; an image file's is 255.
        resize: Shorter side before a centre crop to the model's size; None resizes to that size.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    peak: float = 255.0
    resize: int | None = None


@dataclass(frozen=True)
class InputFormat:
    """What a trained model expects and what its outputs mean; goes wherever the model goes.

    Attributes:
        num_classes: Number of logits.
        image_shape: Channels, height and width.
        class_names: One per class, or none at all.
        pixels: How an image file is to be read, where that is known.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()
    pixels: Pixels | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> InputFormat:
        """Reads what :meth:`to_dict` gave.

        Raises:
            UserError: It is something else.
        """
        try:
            channels, height, width = (int(x) for x in content["image_shape"])
            names = tuple(str(name) for name in content["class_names"])
            pixels = content["pixels"]
            if pixels is not None:
                mean, std = (tuple(float(x) for x in pixels[key]) for key in ("mean", "std"))
                resize = pixels["resize"]
                pixels = Pixels(
                    mean, std, float(pixels["peak"]), None if resize is None else int(resize)
                )
                if not len(mean) == len(std) == channels:
                    raise ValueError(f"{len(mean)} means for {channels} channels")
                if not all(map(math.isfinite, (*mean, *std, pixels.peak))) or min(std) <= 0:
                    raise ValueError("a mean or deviation that is not finite, or not positive")
                if not 0 < (pixels.resize or 1) <= MAX_SIDE:
                    raise ValueError(f"resize {resize}; it must lie in 1 … {MAX_SIDE}")
            num_classes = int(content["num_classes"])
            if min(num_classes, channels, height, width) < 1:
                raise ValueError("a number of classes or pixels below 1")
            if max(height, width) > MAX_SIDE:
                raise ValueError(f"images of {height} × {width}; at most {MAX_SIDE} a side")
            if names and len(names) != num_classes:
                raise ValueError(f"{len(names)} names for {num_classes} classes")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a description of a model's input: {error!r}") from error
        return cls(num_classes, (channels, height, width), names, pixels)


@dataclass(frozen=True)
class ImageData:
    """A classification data set in four parts; the test part is read once, at the end.

    Attributes:
        name: The data set's name.
        num_classes: Targets lie in ``0 .. num_classes - 1``.
        image_shape: Channels, height and width of one image as the model sees it.
        fingerprint: SHA-256 of the data (image folders: of paths and file sizes).
        train: What float training and QAT learn from.
        calibration: Held out of training; initialises quantizers and measures sensitivity.
        validation: Held out of training; watched during training, chooses the best epoch.
        test: Read once, for the figures of the result.
        class_names: One per class, or none at all.
        pixels: How an image file of one's own is to be read.
        class_counts: Images of each class in ``train``, or none at all.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    fingerprint: str
    train: Batches
    calibration: Batches
    validation: Batches
    test: Batches
    class_names: tuple[str, ...] = ()
    pixels: Pixels | None = None
    class_counts: tuple[int, ...] = ()

    @property
    def input_format(self) -> InputFormat:
        """What a model trained on this data expects."""
        return InputFormat(self.num_classes, self.image_shape, self.class_names, self.pixels)

    def for_dry_run(self) -> ImageData:
        """An epoch's last batch and a full one, to try the memory, and a few images elsewhere."""
        return replace(
            self,
            train=FirstBatches(self.train, 2, last_first=True),
            calibration=FirstBatches(self.calibration, 2, 4),
            validation=FirstBatches(self.validation, 2, 4),
            test=FirstBatches(self.test, 2, 4),
        )


@dataclass(frozen=True)
class FirstBatches:
    """The first few batches of each epoch of another :class:`Batches`, cut to a few images.

    Attributes:
        batches: The others.
        limit: How many at most.
        images: So many of each at most.
        last_first: Begins with the epoch's last batch, in whose size there may be a surprise.
    """

    batches: Batches
    limit: int
    images: int | None = None
    last_first: bool = False

    def __len__(self) -> int:
        return min(self.limit, len(self.batches))

    def _index(self, index: int) -> int:
        return (index - 1) % len(self.batches) if self.last_first else index

    def size(self, index: int) -> int:
        """The number of images in batch ``index``."""
        return len(range(self.batches.size(self._index(index)))[: self.images])

    def epoch(self, epoch: int, batches: slice = ALL, images: slice = ALL) -> Iterator[Batch]:
        """Some of the first batches of that epoch."""
        for index in map(self._index, range(len(self))[batches]):
            for pixels, targets in self.batches.epoch(epoch, slice(index, index + 1)):
                yield pixels[: self.images][images], targets[: self.images][images]


@dataclass(frozen=True)
class Loading:
    """How a data set is to be read; a run-time value, the same for every data set.

    Attributes:
        batch_size: Images of a training batch.
        eval_batch_size: Images of a batch elsewhere.
        seed: The run's seed: order and augmentation of the training images.
        device: Where the batches live.
        processes: That share each training batch.
        download: Whether a data set that is not there may be fetched.
    """

    batch_size: int
    eval_batch_size: int
    seed: int
    device: torch.device
    processes: int = 1
    download: bool = True

    @property
    def at_least(self) -> int:
        """Images of a training batch that give every process two."""
        return 2 * self.processes

    def require_download(self, name: str) -> None:
        """Refuses to fetch a data set that nobody has asked for.

        Raises:
            UserError: Says how to ask.
        """
        if not self.download:
            raise UserError(
                f"data: {name} is not on this machine; data.root=<folder> reads it from there, "
                "data.download=true fetches it"
            )


def check_amount(name: str, amount: Amount) -> None:
    """Refuses what is neither a number of images nor a share.

    Raises:
        ValueError: Names the setting.
    """
    if isinstance(amount, str):
        try:
            share(amount)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    elif amount < 1:
        raise ValueError(f"{name} must be at least 1, got {amount}")


def number_of(amount: Amount, total: int) -> int:
    """A number of images; a share of them is rounded, to 1 at least."""
    return max(1, round(share(amount) * total)) if isinstance(amount, str) else amount


def num_images(batches: Batches) -> int:
    """The images of an epoch."""
    return sum(map(batches.size, range(len(batches))))


def set_aside(amount: Amount, num_images: int) -> tuple[Tensor, Tensor]:
    """Indices of images for testing, where a set has none of its own, and of the rest.

    The same for every seed.

    Raises:
        UserError: Nothing would be left.
    """
    count = number_of(amount, num_images)
    if count >= num_images:
        raise UserError(
            f"data.test_images: {amount} leave none of {num_images} images to train on; set fewer "
            "aside"
        )
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    return order[:count], order[count:]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The knobs that every data set has: what is held out of its training part.

    Attributes:
        validation_images: Watched during training; a number, at least 1, or a share of the
            training images such as ``0.1x``.
        calibration_images: Initialise quantizers and measure sensitivity; the same. A share is
            1,024 images at most.
    """

    validation_images: Amount
    calibration_images: Amount

    def __post_init__(self) -> None:
        for name in ("validation_images", "calibration_images"):
            check_amount(name, getattr(self, name))

    def split(self, num_images: int, validation: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the validation, calibration and remaining training images.

        The same for every seed, so that runs with different seeds are compared on the same images.

        Args:
            num_images: Of the training part.
            validation: Whether there are no other images for validation.

        Raises:
            UserError: Nothing would be left to train on.
        """
        watched = number_of(self.validation_images, num_images) if validation else 0
        calibrating = number_of(self.calibration_images, num_images)
        if isinstance(self.calibration_images, str):
            calibrating = min(calibrating, MOST_CALIBRATION)
        end = watched + calibrating
        if num_images - end < 1:
            raise UserError(
                f"data: validation_images ({self.validation_images}) + calibration_images "
                f"({self.calibration_images}) leave none of the {num_images} training images to "
                "train on; hold out fewer, or shares of them such as 0.1x"
            )
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
        return order[:watched], order[watched:end], order[end:]


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine.

    Neighbouring seeds, epochs or indices give unrelated streams, which ``seed + epoch`` would not.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
