"""A network: any ``nn.Module`` from images to logits."""

from torch import Tensor, nn


class Net(nn.Module):
    """Three convolutions and a linear layer.

    Args:
        num_classes: The data set's; given where a constructor takes it.
        in_channels: The data set's; given where a constructor takes it.
        width: A setting of its own, ``model.width``.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, C, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits
