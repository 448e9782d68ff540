"""Mixup and cutmix: batches whose images and labels are blends of two."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from adq_train.data.base import derived_seed
from adq_train.training.hook import Hook
from adq_train.training.trainer import Trainer


class Mixing(Hook):
    """Mixup (Zhang et al. 2018, arXiv 1710.09412), cutmix (Yun et al. 2019, arXiv 1905.04899).

    With λ from Beta(α, α), mixup gives λ x_i + (1 - λ) x_(i-1), and cutmix replaces a rectangle
    of the share 1 - λ of x_i by that of x_(i-1); labels are mixed in the same shares. Where both
    are on, each batch gets one of them, with equal chances. All draws depend on the seed and the
    step alone.

    Args:
        num_classes: K.
        mixup_alpha: α of mixup; 0 is none.
        cutmix_alpha: α of cutmix; 0 is none.
    """

    def __init__(
        self, num_classes: int, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0
    ) -> None:
        alphas = {v2.MixUp: mixup_alpha, v2.CutMix: cutmix_alpha}
        chosen = [
            kind(alpha=alpha, num_classes=num_classes) for kind, alpha in alphas.items() if alpha
        ]
        self.transform = v2.RandomChoice(chosen) if chosen else None

    def on_batch(self, trainer: Trainer, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images of the same shape and class probabilities (N, K); as they are where both are off.

        Args:
            trainer: Its seed and its step decide the draw.
            images: (N, C, H, W).
            targets: (N,) int64.
        """
        if self.transform is None or not len(images):
            return images, targets
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: torch.manual_seed would restart a GPU's dropout with every batch.
            torch.default_generator.manual_seed(derived_seed(trainer.seed, "mixing", trainer.steps))
            mixed: tuple[Tensor, Tensor] = self.transform(images, targets)
            return mixed
