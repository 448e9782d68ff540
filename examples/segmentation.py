"""Segmentation: a small U-Net finds handwritten digits among noise, and names them pixel by pixel.

Two of scikit-learn's digits lie on each picture of 24 × 24 pixels; a pixel is of one of five
classes, 0 to 4, or of the background.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import adq_train

CLASSES = 6  # the background, which is 0, and the digits 0 to 4
SIDE, DIGIT = 24, 12  # pixels


def pictures(count: int, digits: slice, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 24, 24) and the class of every pixel (count, 24, 24)."""
    raw = load_digits(n_class=CLASSES - 1)
    shapes = torch.tensor(raw.images[digits], dtype=torch.float32)[:, None] / 16
    shapes = F.interpolate(shapes, size=DIGIT, mode="bilinear")[:, 0]
    names = torch.tensor(raw.target[digits])
    draw = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, SIDE, SIDE, generator=draw)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for image, mask in zip(images[:, 0], masks, strict=True):
        for left in (0, DIGIT):  # one in each half
            which = int(torch.randint(len(shapes), (), generator=draw))
            down = int(torch.randint(SIDE - DIGIT + 1, (), generator=draw))
            place = slice(down, down + DIGIT), slice(left, left + DIGIT)
            image[place] += shapes[which]
            mask[place][shapes[which] > 0.3] = 1 + names[which]
    return images, masks


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, each with its norm."""
    layers = []
    for size in (inputs, outputs):
        layers += [nn.Conv2d(size, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net of three scales, from (N, 1, H, W) to logits (N, classes, H, W)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = block(1, width), block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = block(2 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel."""
        fine = self.down1(x)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        middle = self.merge2(torch.cat([self.up2(coarse), middle], 1))
        return self.head(self.merge1(torch.cat([self.up1(middle), fine], 1)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int):
    """Minimises the cross-entropy of the pixels, with a rate that falls to zero."""
    model.train()
    steps = epochs * -(-len(x) // 16)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(16):
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def mean_iou(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Intersection over union in per cent, the mean over the digits."""
    found = torch.cat([model(part).argmax(1) for part in x.split(100)])
    shares = [
        ((found == c) & (y == c)).sum() / ((found == c) | (y == c)).sum() for c in range(1, CLASSES)
    ]
    return 100 * float(torch.stack(shares).mean())


def main(epochs: int = 20, images: int = 400, seed: int = 0) -> dict[str, float]:
    """Mean IoU of the float U-Net, after calibration and after QAT; and the sizes in bytes."""
    torch.manual_seed(seed)
    x, y = pictures(images, slice(0, 700), seed=1)
    test_x, test_y = pictures(300, slice(700, None), seed=2)  # of digits that nobody has seen
    model = UNet()
    train(model, torch.optim.AdamW(model.parameters(), 1e-2), x, y, epochs)
    found = {"float": mean_iou(model, test_x, test_y)}

    # Maps of logits: Ω is the divergence of the class probabilities, summed over the pixels.
    quantized = adq_train.quantize(model, [(x[:64], y[:64])], average_bits=2.5)
    found["calibrated"] = mean_iou(quantized.eval(), test_x, test_y)

    optimizer = torch.optim.AdamW(adq_train.parameter_groups(quantized, 3e-3, weight_decay=0.01))
    adq_train.follow(quantized, optimizer)
    train(quantized, optimizer, x, y, epochs)
    found["qat"] = mean_iou(quantized, test_x, test_y)
    found["float_bytes"] = 4 * sum(p.numel() for p in model.parameters())
    found["packed_bytes"] = quantized.adq.allocation.model_size_bytes
    return found


if __name__ == "__main__":
    print(main(seed=int(sys.argv[1]) if sys.argv[1:] else 0))
