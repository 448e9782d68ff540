"""Image folders (``root/train/<class>/*``, ``root/val/<class>/*``), as ImageNet comes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from adq_train.data.base import ALL, Batch, HeldOut, ImageData, Loading, Pixels, derived_seed
from adq_train.errors import UserError

log = logging.getLogger(__name__)

# ImageNet's customary statistics, as torchvision's pretrained weights expect them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Sample = tuple[str, int]  # path, class
Key = tuple[int, int]  # epoch, index


class _Images(Dataset[tuple[Tensor, int] | str]):
    """Decodes one image; its random crop depends on (seed, epoch, index) alone."""

    def __init__(self, samples: Sequence[Sample], transform: v2.Compose, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | str:
        epoch, index = key
        path, target = self.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except Exception as error:  # each of Pillow's formats has errors of its own
            return f"{path} ({error})"
        # fork_rng: without workers this runs in the main process, whose stream must not move.
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: torch.manual_seed would restart a GPU's dropout with every image.
            torch.default_generator.manual_seed(derived_seed(self.seed, epoch, index))
            return self.transform(image), target


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[list[Tensor], list[str]]:
    """Images and targets, perhaps none, and the unreadable ones.

    An exception of a worker would lose its one-line message.
    """
    unreadable = [item for item in items if isinstance(item, str)]
    good = [item for item in items if not isinstance(item, str)]
    if not good:  # still a batch of training: other processes may have images of it
        empty = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        return [empty, torch.empty(0, dtype=torch.int64)], unreadable
    images, targets = zip(*good, strict=True)
    return [torch.stack(images), torch.tensor(targets)], unreadable


class Unreadable:
    """The images of a run that cannot be decoded; they are left out up to a limit.

    Args:
        limit: So many may be left out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.found: set[str] = set()

    def add(self, image: str) -> None:
        """Reports an image when it is met first.

        Args:
            image: Its path and what is wrong with it.

        Raises:
            UserError: There are more than the limit.
        """
        if image in self.found:
            return
        self.found.add(image)
        if len(self.found) > self.limit:
            allowed = f"data.skip_unreadable_images={self.limit} are left out; " * bool(self.limit)
            raise UserError(
                f"data.root: cannot read the image {image}; {allowed}replace or remove it, or "
                "leave out a few with data.skip_unreadable_images"
            )
        log.warning(
            "cannot read the image %s; left out (%d of at most %d, data.skip_unreadable_images)",
            image,
            len(self.found),
            self.limit,
        )


class _Order:
    """Batches of (epoch, index) keys, shuffled by (seed, epoch) or in order."""

    def __init__(self, num_images: int, batch_size: int, shuffle_seed: int | None) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.epoch, self.batches, self.images = 0, ALL, ALL

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.arange(self.num_images)
        if self.shuffle_seed is not None:
            seed = derived_seed(self.shuffle_seed, self.epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.num_images, generator=generator)
        for start in range(0, self.num_images, self.batch_size)[self.batches]:
            part = order[start : start + self.batch_size].tolist()
            yield [(self.epoch, index) for index in part[self.images]]


class FolderBatches:
    """Batches of decoded images; decoding runs in worker processes, normalising on the device."""

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: v2.Compose,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        shuffle: bool,
        device: torch.device,
        unreadable: Unreadable,
    ) -> None:
        self.unreadable = unreadable
        self.num_images = len(samples)
        self.order = _Order(len(samples), batch_size, seed if shuffle else None)
        self.device = device
        self.loader: DataLoader[Any] = DataLoader(
            _Images(samples, transform, seed),
            batch_sampler=self.order,
            collate_fn=_collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0 and shuffle,
            # Of its own: the loader draws a seed whenever it starts, and dropout's stream must
            # not depend on how often that is.
            generator=torch.Generator(),
            pin_memory=device.type == "cuda",
        )
        self.mean = torch.tensor(MEAN, device=device).mul(255).view(1, 3, 1, 1)
        self.std = torch.tensor(STD, device=device).mul(255).view(1, 3, 1, 1)

    def __len__(self) -> int:
        return len(self.order)

    def size(self, index: int) -> int:
        """The number of images in batch ``index``."""
        return min(self.order.batch_size, self.num_images - index * self.order.batch_size)

    def epoch(self, epoch: int, batches: slice = ALL, images: slice = ALL) -> Iterator[Batch]:
        """Some batches of one epoch; only what they hold is decoded.

        Raises:
            UserError: More images than allowed cannot be decoded; the path of one is named.
        """
        self.order.epoch, self.order.batches, self.order.images = epoch, batches, images
        for batch, unreadable in self.loader:
            for image in unreadable:
                self.unreadable.add(image)
            if not len(batch[1]) and self.order.shuffle_seed is None:
                continue
            pixels, targets = (t.to(self.device, non_blocking=True) for t in batch)
            yield pixels.float().sub_(self.mean).div_(self.std), targets


def list_images(folder: Path) -> ImageFolder:
    """Lists a folder of classes, as torchvision does.

    Raises:
        UserError: The folder is missing, or a class in it has no images.
    """
    try:
        return ImageFolder(str(folder))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"data.root: {folder} is not a folder of classes with images ({error}); expected "
            "train/<class>/*.JPEG and val/<class>/*.JPEG under data.root"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Folders(HeldOut):
    """ImageNet or any other image folder; ``val/`` is the test part.

    Attributes:
        root: Folder with ``train/`` and ``val/``.
        image_size: Height and width that the model sees.
        resize: Shorter side before the centre crop, outside training.
        num_workers: Processes that decode images; 0 decodes in the main process.
        skip_unreadable_images: So many images that cannot be decoded are left out; one more is
            an error.
    """

    root: str
    image_size: int
    resize: int
    num_workers: int
    skip_unreadable_images: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}")
        if self.skip_unreadable_images < 0:
            raise ValueError(
                f"skip_unreadable_images must be at least 0, got {self.skip_unreadable_images}"
            )
        if not 0 < self.image_size <= self.resize:
            raise ValueError(
                f"image_size must lie in 1 … resize ({self.resize}), got {self.image_size}"
            )

    def load(self, loading: Loading) -> ImageData:
        """Lists the images; they are read batch by batch.

        Raises:
            UserError: A folder is missing, or the two parts have different classes.
        """
        train = list_images(Path(self.root, "train"))
        test = list_images(Path(self.root, "val"))
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise UserError(f"data.root: train/ and val/ have different classes (say, {odd[0]})")
        parts = self.split(len(train.samples))
        validation, calibration, training = ([train.samples[i] for i in p.tolist()] for p in parts)

        to_tensor = v2.PILToTensor()
        crop = v2.RandomResizedCrop(self.image_size, antialias=True)
        augment = v2.Compose([crop, v2.RandomHorizontalFlip(), to_tensor])
        resize = v2.Resize(self.resize, antialias=True)
        center = v2.Compose([resize, v2.CenterCrop(self.image_size), to_tensor])

        unreadable = Unreadable(self.skip_unreadable_images)

        def batches(samples: Sequence[Sample], shuffle: bool = False) -> FolderBatches:
            return FolderBatches(
                samples,
                augment if shuffle else center,
                batch_size=loading.batch_size if shuffle else loading.eval_batch_size,
                num_workers=self.num_workers,
                seed=loading.seed,
                shuffle=shuffle,
                device=loading.device,
                unreadable=unreadable,
            )

        fingerprint = hashlib.sha256()
        for path, target in (*train.samples, *test.samples):
            name = Path(path).relative_to(self.root)
            fingerprint.update(f"{name} {target} {Path(path).stat().st_size}\n".encode())
        return ImageData(
            name="image_folder",
            num_classes=len(train.classes),
            image_shape=(3, self.image_size, self.image_size),
            fingerprint=fingerprint.hexdigest(),
            train=batches(training, shuffle=True),
            calibration=batches(calibration),
            validation=batches(validation),
            test=batches(test.samples),
            class_names=tuple(train.classes),
            pixels=Pixels(
                tuple(255 * x for x in MEAN), tuple(255 * x for x in STD), resize=self.resize
            ),
        )
