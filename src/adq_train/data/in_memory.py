"""Small image sets, kept as uint8 on the training device and augmented there in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adq_train.data.base import (
    ALL,
    Amount,
    Batch,
    BatchPlan,
    HeldOut,
    ImageData,
    Loading,
    Pixels,
    check_amount,
    derived_seed,
    number_of,
)
from adq_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Limited(HeldOut):
    """The knobs of a data set of which a part may do.

    Attributes:
        train_images: Only the first so many training images, or such a share of them, before any
            are held out; None: all.
    """

    train_images: Amount | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_images is not None:
            check_amount("train_images", self.train_images)

    def limit(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The first training images (M, C, H, W) with their targets (M,).

        Raises:
            UserError: There are fewer than asked for.
        """
        wanted = number_of(self.train_images or len(images), len(images))
        if wanted > len(images):
            raise UserError(
                f"data.train_images: {self.train_images} are asked for and there are "
                f"{len(images)}; null takes all"
            )
        return images[:wanted], targets[:wanted]


@dataclass(frozen=True)
class Augmentation:
    """Random shifts and mirror images.

    Attributes:
        crop_padding: Zero pixels added on each side before a random crop of the original size.
        flip: Whether half of the images are mirrored left to right.
    """

    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0, got {self.crop_padding}")


def require_padding(crop_padding: int, side: int) -> None:
    """Checks a random shift against the side of the images, which could leave the picture.

    Raises:
        ValueError: It is negative or larger.
    """
    if not 0 <= crop_padding <= side:
        raise ValueError(f"crop_padding must lie in 0 … {side}, got {crop_padding}")


def crop_and_flip(
    padded: Tensor,
    indices: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Crops a window out of each chosen image, mirrored where asked, in one gather.

    Args:
        padded: All images with their borders, (M, C, H + 2p, W + 2p).
        indices: Which images, (N,).
        top: First row of each window, (N,).
        left: First column of each window, (N,).
        flip: Whether to mirror each window, (N,) bool.
        height: Rows of a window.
        width: Columns of a window.

    Returns:
        The windows, (N, C, height, width), in channels-last memory order.
    """
    rows = top[:, None] + torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device).expand(len(indices), -1)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    windows = padded[indices[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return windows.permute(0, 3, 1, 2)


class InMemoryBatches:
    """Batches of a uint8 image tensor, normalised on its device.

    Args:
        images: (M, C, H, W) uint8.
        targets: (M,) int64.
        batch_size: Images of a batch; the last one of an epoch may be smaller.
        mean: Per-channel mean of the pixel values, (C,), in 0 … 255.
        std: Per-channel standard deviation, (C,), in 0 … 255.
        shuffle_seed: Seed of order and augmentation; None keeps the order and augments nothing.
        augmentation: Used only with a ``shuffle_seed``.
        at_least: Fewer images that are left over are added to the last batch.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        shuffle_seed: int | None = None,
        augmentation: Augmentation = Augmentation(),
        at_least: int = 1,
    ) -> None:
        self.plan = BatchPlan(len(images), batch_size, at_least)
        self.targets = targets
        self.shuffle_seed = shuffle_seed
        self.augmentation = augmentation
        self.shape = images.shape[-2], images.shape[-1]
        padding = 0 if shuffle_seed is None else augmentation.crop_padding
        self.padded = torch.nn.functional.pad(images, [padding] * 4)
        self.scale = (1 / std).view(1, -1, 1, 1)
        self.shift = (-mean / std).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.plan)

    def size(self, index: int) -> int:
        """The number of images in batch ``index``."""
        return self.plan.size(index)

    def epoch(self, epoch: int, batches: slice = ALL, images: slice = ALL) -> Iterator[Batch]:
        """Some batches of one epoch; its random numbers are all drawn before the first one."""
        device = self.padded.device
        every, num_images = range(self.plan.num_images), self.plan.num_images
        chosen = [every[self.plan.images(i)][images] for i in range(len(self))[batches]]
        parts = [slice(x.start, x.stop, x.step) for x in chosen]
        if self.shuffle_seed is None:
            for part in parts:
                yield self._normalize(self.padded[part]), self.targets[part]
            return
        # Drawn on the CPU, so that the order is the same on every device.
        generator = torch.Generator().manual_seed(derived_seed(self.shuffle_seed, epoch))
        order = torch.randperm(num_images, generator=generator)
        shifts = 2 * self.augmentation.crop_padding + 1
        offsets = torch.randint(shifts, (2, num_images), generator=generator)
        flips = torch.rand(num_images, generator=generator) < 0.5
        flips &= self.augmentation.flip
        order, top, left, flips = (t.to(device) for t in (order, offsets[0], offsets[1], flips))
        for part in parts:
            windows = crop_and_flip(
                self.padded, order[part], top[part], left[part], flips[part], *self.shape
            )
            yield self._normalize(windows), self.targets[order[part]]

    def _normalize(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


def require_one_shape(train: Tensor, test: Tensor) -> None:
    """Refuses test images (M, C, H, W) of another shape than the training images.

    Raises:
        UserError: Says both.
    """
    if test.shape[1:] != train.shape[1:]:
        raise UserError(
            f"data: training images of shape {tuple(train.shape[1:])} and test images of shape "
            f"{tuple(test.shape[1:])} do not belong together; fetch the files again"
        )


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C,) each, of images (N, C, H, W)."""
    pixels = images.float().transpose(0, 1).flatten(1)
    mean, std = pixels.mean(1), pixels.std(1)
    # An image set of one colour has no spread to divide by.
    return mean, torch.where(std > 0, std, 1.0)


def fingerprint_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the values of some tensors."""
    fingerprint = hashlib.sha256()
    for tensor in tensors:
        fingerprint.update(tensor.contiguous().numpy().data)
    return fingerprint.hexdigest()


def split_in_memory(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    held_out: HeldOut,
    augmentation: Augmentation,
    loading: Loading,
    class_names: tuple[str, ...] = (),
    peak: float = 255.0,
    validation: tuple[Tensor, Tensor] | None = None,
) -> ImageData:
    """Holds validation and calibration images out of the training part and makes the loaders.

    Pixels are normalised with the mean and standard deviation of what is left for training.

    Args:
        name: The data set's name.
        train: Images (M, C, H, W) uint8 and targets (M,) int64.
        test: The same for the test part.
        num_classes: Number of classes.
        held_out: How many images to hold out.
        augmentation: What training images go through.
        loading: Batch sizes, seed and device.
        class_names: One per class, or none at all.
        peak: The largest value that a pixel can have.
        validation: As ``train``, where the data set has such a part; otherwise it is held out.

    Raises:
        UserError: Nothing would be left to train on, or test images have another shape.
    """
    images, targets = train
    for other in (test, *([validation] if validation else [])):
        require_one_shape(images, other[0])
    parts = held_out.split(len(images), validation is None)
    mean, std = (x.to(loading.device) for x in statistics(images[parts[2]]))

    def batches(
        images: Tensor, targets: Tensor, at_least: int = 1, training: bool = False
    ) -> InMemoryBatches:
        return InMemoryBatches(
            images.to(loading.device),
            targets.to(loading.device),
            loading.batch_size if training else loading.eval_batch_size,
            mean,
            std,
            loading.seed if training else None,
            augmentation if training else Augmentation(),
            at_least,
        )

    watched, calibration, training = ((images[part], targets[part]) for part in parts)
    return ImageData(
        name=name,
        num_classes=num_classes,
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        fingerprint=fingerprint_of((*train, *test, *(validation or ()))),
        train=batches(*training, loading.at_least, training=True),
        calibration=batches(*calibration, at_least=2),
        validation=batches(*(validation or watched)),
        test=batches(*test),
        class_names=class_names,
        pixels=Pixels(tuple(mean.tolist()), tuple(std.tolist()), peak),
        class_counts=tuple(training[1].bincount(minlength=num_classes).tolist()),
    )
