"""Generated images in the shape of any data set, to try speed and memory without the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adq_train.data.base import HeldOut, ImageData, Loading
from adq_train.data.in_memory import Augmentation, split_in_memory

MAX_BYTES = 4_000_000_000  # of all images; in training they need some six times as much


@dataclass(frozen=True)
class Shape:
    """Channels, height and width of the images, and the number of classes."""

    image: tuple[int, int, int]
    num_classes: int


SHAPES = {
    "digits": Shape((1, 8, 8), 10),
    "fashion_mnist": Shape((1, 28, 28), 10),
    "cifar10": Shape((3, 32, 32), 10),
    "cifar100": Shape((3, 32, 32), 100),
    "imagenet": Shape((3, 224, 224), 1000),
}


def generate(num_images: int, shape: Shape, seed: int) -> tuple[Tensor, Tensor]:
    """Images that a network can learn: a coarse random pattern per class, under noise.

    Returns:
        Images (num_images, C, H, W) uint8 and targets (num_images,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape.image
    targets = torch.randint(shape.num_classes, (num_images,), generator=generator)
    # The patterns come from a generator of their own: train and test must share them.
    patterns = torch.randn(
        shape.num_classes, channels, 4, 4, generator=torch.Generator().manual_seed(0)
    )
    images = torch.empty(num_images, channels, height, width, dtype=torch.uint8)
    for start in range(0, num_images, 256):
        part = slice(start, start + 256)
        pattern = F.interpolate(patterns[targets[part]], (height, width), mode="bilinear")
        noise = torch.randn(pattern.shape, generator=generator)
        images[part] = (128 + 40 * (pattern + noise)).clamp_(0, 255).to(torch.uint8)
    return images, targets


@dataclass(frozen=True, kw_only=True)
class Synthetic(HeldOut):
    """Generated data, the same for every seed.

    Attributes:
        like: The data set whose image shape and number of classes to take.
        train_images: How many images to generate for training and what is held out of it.
        test_images: How many to generate for testing.
    """

    like: str
    train_images: int
    test_images: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.like not in SHAPES:
            raise ValueError(f"like must be one of {', '.join(SHAPES)}, got {self.like!r}")
        for name in ("train_images", "test_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        each = math.prod(SHAPES[self.like].image)
        needed = each * (self.train_images + self.test_images)
        if needed > MAX_BYTES:
            raise ValueError(
                f"train_images: {self.train_images:,} and {self.test_images:,} test_images of "
                f"{each:,} bytes take {needed / 1e9:,.0f} GB, and at most {MAX_BYTES / 1e9:g} GB "
                f"are allowed, {MAX_BYTES // each:,} images in all"
            )

    def load(self, loading: Loading) -> ImageData:
        """Generates the images."""
        shape = SHAPES[self.like]
        return split_in_memory(
            f"synthetic-{self.like}",
            generate(self.train_images, shape, seed=1),
            generate(self.test_images, shape, seed=2),
            num_classes=shape.num_classes,
            held_out=self,
            augmentation=Augmentation(),
            loading=loading,
        )
