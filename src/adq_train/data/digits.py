"""scikit-learn's handwritten digits: 1,797 images of 8 × 8 pixels, inside its wheel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adq_train.data.base import (
    Amount,
    ImageData,
    Loading,
    check_amount,
    number_of,
    set_aside,
)
from adq_train.data.in_memory import Augmentation, Limited, require_padding, split_in_memory

NUM_IMAGES = 1797


@dataclass(frozen=True, kw_only=True)
class Digits(Limited):
    """The digits; the set has no test part of its own, so a fixed random part of it serves.

    Attributes:
        test_images: How many images to set aside for testing, or which share, the same for every
            seed.
        crop_padding: Random shift in pixels.
    """

    test_images: Amount
    crop_padding: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.test_images, str):
            check_amount("test_images", self.test_images)
        if not 0 < number_of(self.test_images, NUM_IMAGES) < NUM_IMAGES:
            raise ValueError(
                f"test_images must lie in 1 … {NUM_IMAGES - 1}, got {self.test_images}"
            )
        require_padding(self.crop_padding, 8)

    def load(self, loading: Loading) -> ImageData:
        """Reads the set from scikit-learn."""
        # Imported here: scikit-learn takes a second, and no other data set needs it.
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Pixels are 0 … 16, whole numbers; normalisation takes care of the range.
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        targets = torch.from_numpy(digits.target).long()
        test, train = set_aside(self.test_images, len(images))
        return split_in_memory(
            "digits",
            self.limit(images[train], targets[train]),
            (images[test], targets[test]),
            num_classes=10,
            held_out=self,
            augmentation=Augmentation(self.crop_padding),
            loading=loading,
            class_names=tuple(map(str, range(10))),
            peak=16.0,
        )
