"""Images per second out of an image folder: this project's reader beside torchvision's own.

    python scripts/bench_data.py                       # made-up JPEGs, in this process
    python scripts/bench_data.py --workers 2 --json
    python scripts/bench_data.py --root /data/imagenet --workers 8 --batch-size 256

Both read the same training images at random, crop them at random to 224 x 224, mirror half of
them, and hand over normalised float32 batches on the CPU. torchvision's side is its ImageFolder
with RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize under a DataLoader with
persistent workers. The two take turns; the first epoch of each, which starts the workers and
fills the cache of the file system, is not counted. One image is held out for each other part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from adq_train.data.base import Loading
from adq_train.data.image_files import MEAN, STD
from adq_train.data.image_folder import Folders
from adq_train.training.throughput import peak_memory_bytes

SIZE = 224


def write_images(root: Path, count: int, height: int, width: int) -> None:
    """Made-up JPEGs with the detail of photographs, about 100 kB each at 375 x 500."""
    random = np.random.default_rng(0)
    for part, number in (("train", count), ("val", 2)):
        for index in range(number):
            coarse = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            noise = random.normal(0, 12, (height, width, 3))
            pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
            folder = root / part / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index:06}.jpg", quality=90)


def torchvision_batches(options: argparse.Namespace) -> Callable[[int], Iterable[object]]:
    """What one would write with torchvision."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = ImageFolder(str(options.root / "train"), transform)
    loader = DataLoader(
        Subset(images, range(len(images) - 2)),  # as many as the other side trains on
        batch_size=options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    return lambda epoch: loader


def own_batches(options: argparse.Namespace) -> Callable[[int], Iterable[object]]:
    """This project's."""
    folders = Folders(
        root=str(options.root),
        image_size=SIZE,
        resize=256,
        num_workers=options.workers,
        validation_images=1,
        calibration_images=1,
    )
    loading = Loading(options.batch_size, options.batch_size, 0, torch.device("cpu"))
    return folders.load(loading).train.epoch


def images_per_second(batches: Iterable[object]) -> float:
    began, count = time.perf_counter(), 0
    for images, _ in batches:  # type: ignore[misc]
        count += len(images)
    return count / (time.perf_counter() - began)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Median and range of the epochs of both sides, which take turns."""
    sides = {"torchvision": torchvision_batches(options), "adq-train": own_batches(options)}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for epoch in range(options.repetitions + 1):
        for name, batches in sides.items():
            speed = images_per_second(batches(epoch))
            if epoch:
                found[name].append(speed)
    base = statistics.median(found["torchvision"])
    return {
        "device": f"CPU, {os.cpu_count()} cores",
        "workers": options.workers,
        "batch_size": options.batch_size,
        "repetitions": options.repetitions,
        "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
        "rows": [
            {
                "name": name,
                "images_per_second": statistics.median(speeds),
                "lowest": min(speeds),
                "highest": max(speeds),
                "ratio_to_torchvision": statistics.median(speeds) / base,
            }
            for name, speeds in found.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with train/ and val/; else made up")
    parser.add_argument("--images", type=int, default=256, help="made-up images")
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.root is None:
            options.root = Path(scratch)
            write_images(options.root, options.images, options.height, options.width)
        result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['device']}, {options.workers} workers, batches of {options.batch_size}")
    for row in result["rows"]:  # type: ignore[attr-defined]
        print(
            f"{row['name']:12} {row['images_per_second']:7.1f} images/s "
            f"({row['lowest']:.1f} to {row['highest']:.1f}), "
            f"{row['ratio_to_torchvision']:.2f} of torchvision's"
        )


if __name__ == "__main__":
    main()
