"""Detection: what digit is where? A backbone with two heads, and batches of lists and dicts.

The network cuts a picture of 32 × 32 pixels into 4 × 4 cells; each says what digit has its centre
there, if any, and where the box around it lies.
"""

import itertools
import sys
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import adq_train

SIDE, CELL, CLASSES = 32, 8, 6  # pixels, pixels; digits 0 to 4, and nothing, which is 0


def pictures(count: int, digits: slice, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images (1, 32, 32), each with two boxes (2, 4), left, top, right, bottom, and labels (2,)."""
    raw = load_digits(n_class=CLASSES - 1)
    shapes = torch.tensor(raw.images[digits], dtype=torch.float32) / 16
    names = torch.tensor(raw.target[digits])
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        image, boxes, labels = 0.2 * torch.randn(1, SIDE, SIDE, generator=draw), [], []
        for half in (0, SIDE // 2):
            size = int(torch.randint(8, 15, (), generator=draw))
            left = half + int(torch.randint(SIDE // 2 - size + 1, (), generator=draw))
            top = int(torch.randint(SIDE - size + 1, (), generator=draw))
            which = int(torch.randint(len(shapes), (), generator=draw))
            shape = F.interpolate(shapes[which][None, None], size=size, mode="bilinear")[0, 0]
            image[0, top : top + size, left : left + size] += shape
            boxes.append([left, top, left + size, top + size])
            labels.append(1 + names[which])
        target = {"boxes": torch.tensor(boxes).float(), "labels": torch.stack(labels)}
        found.append((image, target))
    return found


def cells(targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The class (N, 4, 4) and the box (N, 4, 4, 4) that each cell is to give."""
    n, grid = len(targets), SIDE // CELL
    classes, boxes = torch.zeros(n, grid, grid, dtype=torch.long), torch.zeros(n, 4, grid, grid)
    for i, target in enumerate(targets):
        middle = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2 // CELL
        each = zip(middle.long(), target["boxes"], target["labels"], strict=True)
        for (x, y), box, label in each:
            classes[i, y, x], boxes[i, :, y, x] = label, box / SIDE
    return classes, boxes


class Detector(nn.Module):
    """From images (N, 1, 32, 32) to classes (N, 6, 4, 4) and boxes (N, 4, 4, 4) of the cells."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [1, width, 2 * width, 4 * width]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.classes = nn.Conv2d(sizes[-1], CLASSES, 3, padding=1)
        self.boxes = nn.Conv2d(sizes[-1], 4, 3, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classes and boxes of the cells."""
        x = self.backbone(images)
        return {"classes": self.classes(x), "boxes": self.boxes(x)}


Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def batches(pairs: list[tuple[Tensor, dict[str, Tensor]]], size: int) -> list[Batch]:
    """Lists of images and of their targets, as detectors are given them."""
    parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [([image for image, _ in part], [target for _, target in part]) for part in parts]


def run(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """How a batch goes in."""
    return model(torch.stack(batch[0]))


def loss_of(result: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """Cross-entropy of the classes and the distance of the boxes where there is something."""
    classes, boxes = cells(targets)
    there = (classes > 0)[:, None].expand_as(boxes)
    weight = torch.tensor([0.3] + [1.0] * (CLASSES - 1))
    distance = F.smooth_l1_loss(result["boxes"][there], boxes[there])
    return F.cross_entropy(result["classes"], classes, weight) + 5 * distance


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pairs: list[Any], epochs: int):
    """Minimises the loss, with a rate that falls to zero."""
    model.train()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        order = torch.randperm(len(pairs)).tolist()
        for batch in batches([pairs[i] for i in order], 32):
            loss = loss_of(run(model, batch), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def found_percent(model: nn.Module, pairs: list[Any]) -> float:
    """The share of digits whose cell names them, with a box that shares half (an IoU of 0.5)."""
    right = total = 0
    for images, targets in batches(pairs, 100):
        result = run(model, (images, targets))
        classes, boxes = cells(targets)
        there = classes > 0
        ours = result["boxes"].permute(0, 2, 3, 1)[there]
        truth = boxes.permute(0, 2, 3, 1)[there]
        low, high = (
            torch.maximum(ours[:, :2], truth[:, :2]),
            torch.minimum(ours[:, 2:], truth[:, 2:]),
        )
        shared = (high - low).clamp_min(0).prod(1)
        both = (ours[:, 2:] - ours[:, :2]).prod(1) + (truth[:, 2:] - truth[:, :2]).prod(1) - shared
        named = result["classes"].argmax(1)[there] == classes[there]
        right += int((named & (shared / both > 0.5)).sum())
        total += int(there.sum())
    return 100 * right / total


def main(epochs: int = 20, images: int = 800, seed: int = 0) -> dict[str, float]:
    """Digits that the float network finds, after calibration and after QAT, in per cent."""
    torch.manual_seed(seed)
    training = pictures(images, slice(0, 700), seed=1)
    test = pictures(200, slice(700, None), seed=2)
    model = Detector()
    train(model, torch.optim.AdamW(model.parameters(), 1e-2), training, epochs)
    found = {"float": found_percent(model, test)}

    # Classes and boxes both count, each relative to its size.
    quantized = adq_train.quantize(model, batches(training[:64], 32), average_bits=3, forward=run)
    found["calibrated"] = found_percent(quantized.eval(), test)

    optimizer = torch.optim.AdamW(adq_train.parameter_groups(quantized, 2e-3, weight_decay=0.01))
    adq_train.follow(quantized, optimizer)
    train(quantized, optimizer, training, epochs)
    found["qat"] = found_percent(quantized, test)

    # The backbone alone, for heads of one's own: its features are compared.
    features = [torch.stack(images) for images, _ in batches(training[:64], 32)]
    backbone = adq_train.quantize(model.backbone, features, average_bits=3, sensitivity="mse")
    whole = Detector().eval()
    whole.load_state_dict(model.state_dict())
    whole.backbone = backbone.eval()
    found["backbone_calibrated"] = found_percent(whole, test)
    return found


if __name__ == "__main__":
    print(main(seed=int(sys.argv[1]) if sys.argv[1:] else 0))
