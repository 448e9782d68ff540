"""A data set: settings, and a ``load()`` that reads the images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adq_train.data.base import HeldOut, ImageData, Loading
from adq_train.data.in_memory import Augmentation, split_in_memory

NAMES = ("row", "column", "cross", "frame")


@dataclass(frozen=True, kw_only=True)
class Shapes(HeldOut):
    """Four shapes under noise, 12 × 12 pixels; ``data.validation_images`` and more are HeldOut's.

    Attributes:
        train_images: How many to draw for training and what is held out of it.
        test_images: How many to draw for testing.
    """

    train_images: int
    test_images: int

    def load(self, loading: Loading) -> ImageData:
        """Draws the images; one's own would be read here."""
        return split_in_memory(
            "shapes",
            draw(self.train_images, seed=1),
            draw(self.test_images, seed=2),
            num_classes=len(NAMES),
            held_out=self,
            augmentation=Augmentation(crop_padding=1),
            loading=loading,
            class_names=NAMES,
        )


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 12, 12) uint8 and their classes (count,) int64."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(len(NAMES), (count,), generator=generator)
    images = torch.zeros(count, 12, 12)
    for image, target in zip(images, targets.tolist(), strict=True):
        row, column = torch.randint(3, 9, (2,), generator=generator).tolist()
        if NAMES[target] in ("row", "cross"):
            image[row, 1:11] = 150
        if NAMES[target] in ("column", "cross"):
            image[1:11, column] = 150
        if NAMES[target] == "frame":
            image[row - 2 : row + 3, column - 2 : column + 3] = 150
            image[row - 1 : row + 2, column - 1 : column + 2] = 0
    noisy = images + 40 * torch.rand(images.shape, generator=generator)
    return noisy.unsqueeze(1).to(torch.uint8), targets
