"""Image files of any size, read batch by batch, whatever says which file is of which class."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from adq_train.cpus import usable_cpus
from adq_train.data.base import (
    ALL,
    MAX_SIDE,
    Amount,
    Batch,
    BatchPlan,
    HeldOut,
    ImageData,
    Loading,
    Pixels,
    check_amount,
    derived_seed,
    set_aside,
)
from adq_train.data.listing import Sample
from adq_train.data.pictures import UnreadableError, file_size, read_picture, shown
from adq_train.errors import UserError

log = logging.getLogger(__name__)

# ImageNet's customary statistics, as torchvision's pretrained weights expect them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

MAX_BATCH_BYTES = 16_000_000_000
MAX_WORKERS = 64

Key = tuple[int, int]  # epoch, index


class Broken(NamedTuple):
    """The path of an image that cannot be read, and why."""

    path: str
    reason: str


class _Images(Dataset[tuple[Tensor, int] | Broken]):
    """Decodes one image; its random crop depends on (seed, epoch, index) alone."""

    def __init__(
        self, samples: Sequence[Sample], transform: v2.Compose, seed: int, resize: int
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.resize = resize

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | Broken:
        epoch, index = key
        path, target = self.samples[index]
        try:
            image = read_picture(path, "RGB", self.resize)
        except UnreadableError as error:
            return Broken(path, str(error))
        # fork_rng: without workers this runs in the main process, whose stream must not move.
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: torch.manual_seed would restart a GPU's dropout with every image.
            torch.default_generator.manual_seed(derived_seed(self.seed, epoch, index))
            return self.transform(image), target


def _collate(items: list[tuple[Tensor, int] | Broken]) -> tuple[list[Tensor], list[Broken]]:
    """Images and targets, perhaps none, and the unreadable ones.

    An exception of a worker would lose its one-line message.
    """
    unreadable = [item for item in items if isinstance(item, Broken)]
    good = [item for item in items if not isinstance(item, Broken)]
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

    def add(self, broken: Broken) -> None:
        """Reports an image when it is met first.

        Raises:
            UserError: There are more than the limit.
        """
        if broken.path in self.found:
            return
        self.found.add(broken.path)
        image = f"{shown(broken.path)} ({broken.reason})"
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

    def __init__(self, plan: BatchPlan, shuffle_seed: int | None) -> None:
        self.plan = plan
        self.shuffle_seed = shuffle_seed
        self.epoch, self.batches, self.images = 0, ALL, ALL

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.arange(self.plan.num_images)
        if self.shuffle_seed is not None:
            seed = derived_seed(self.shuffle_seed, self.epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.plan.num_images, generator=generator)
        for index in range(len(self.plan))[self.batches]:
            part = order[self.plan.images(index)].tolist()
            yield [(self.epoch, index) for index in part[self.images]]


def readers(wanted: int | None) -> int:
    """Processes that decode images for one process of a run.

    Args:
        wanted: So many; None: its share of the CPUs that it may use.
    """
    if wanted is not None:
        return wanted
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # from torchrun
    return min(max(1, usable_cpus() // sharing), MAX_WORKERS)


class FolderBatches:
    """Batches of decoded images; decoding runs in worker processes, normalising on the device."""

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: v2.Compose,
        *,
        settings: ImageFiles,
        plan: BatchPlan,
        loading: Loading,
        shuffle: bool,
        unreadable: Unreadable,
    ) -> None:
        num_workers, device = readers(settings.num_workers), loading.device
        self.unreadable = unreadable
        self.order = _Order(plan, loading.seed if shuffle else None)
        self.device = device
        self.loader: DataLoader[Any] = DataLoader(
            _Images(samples, transform, loading.seed, settings.resize),
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
        return self.order.plan.size(index)

    def epoch(self, epoch: int, batches: slice = ALL, images: slice = ALL) -> Iterator[Batch]:
        """Some batches of one epoch; only what they hold is decoded.

        A training image that is left alone among broken ones is left out with them: a batch norm
        over 1 × 1 pixels could not take it.

        Raises:
            UserError: More images than allowed cannot be decoded; the path of one is named.
        """
        self.order.epoch, self.order.batches, self.order.images = epoch, batches, images
        beside = None
        if self.device.type == "cuda":
            beside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream(self.device))  # has made mean and std
        for batch, unreadable in self.loader:
            for image in unreadable:
                self.unreadable.add(image)
            if self.order.shuffle_seed is not None:
                if unreadable and len(batch[1]) == 1:
                    batch = [x[:0] for x in batch]
            elif not len(batch[1]):
                continue
            yield self._sent(batch, beside)

    def _sent(self, batch: list[Tensor], beside: torch.cuda.Stream | None) -> Batch:
        """A batch on the device, normalised; on a stream beside the step that is under way."""
        with contextlib.nullcontext() if beside is None else torch.cuda.stream(beside):
            pixels, targets = (t.to(self.device, non_blocking=True) for t in batch)
            images = (pixels - self.mean).div_(self.std)
        if beside is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(beside)
            for tensor in (images, targets):  # or their memory would be free too early
                tensor.record_stream(now)
        return images, targets


@dataclass(frozen=True)
class Listed:
    """Which files there are.

    Attributes:
        folder: Around them; the data's fingerprint has their paths from here.
        classes: Names, by target.
        train: For training, and for what is held out of it.
        validation: None where they are held out of training.
        test: None where they are set aside from training.
    """

    folder: Path
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...] | None = None
    test: tuple[Sample, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ImageFiles(HeldOut, ABC):
    """The knobs of all sets of image files.

    Attributes:
        image_size: Height and width that the model sees.
        resize: Shorter side before the centre crop, outside training.
        num_workers: Processes that decode images; 0 decodes in the main process, None takes one
            for each CPU that this process may use, shared with the run's others on its machine.
        test_images: How many, or which share, to set aside for testing where the set has no part
            for that; None: it must have one.
        skip_unreadable_images: So many images that cannot be decoded are left out; one more is
            an error.
    """

    name: ClassVar[str] = "image_folder"

    image_size: int
    resize: int
    num_workers: int | None
    test_images: Amount | None = None
    skip_unreadable_images: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_images is not None:
            check_amount("test_images", self.test_images)
        workers = max(MAX_WORKERS, 4 * (os.cpu_count() or 1))
        if self.num_workers is not None and not 0 <= self.num_workers <= workers:
            raise ValueError(f"num_workers must lie in 0 … {workers}, got {self.num_workers}")
        if self.skip_unreadable_images < 0:
            raise ValueError(
                f"skip_unreadable_images must be at least 0, got {self.skip_unreadable_images}"
            )
        if not 0 < self.image_size <= self.resize:
            raise ValueError(
                f"image_size must lie in 1 … resize ({self.resize}), got {self.image_size}"
            )
        if self.resize > MAX_SIDE:
            raise ValueError(f"resize must be at most {MAX_SIDE}, got {self.resize}")

    @abstractmethod
    def listed(self) -> Listed:
        """Which files there are.

        Raises:
            UserError: They cannot be listed.
        """

    def load(self, loading: Loading) -> ImageData:
        """Lists the images; they are read batch by batch.

        Raises:
            UserError: The files cannot be listed, a batch would be too large, or more files than
                allowed cannot be read, as far as that shows now.
        """
        found = self.listed()
        self._check_memory(loading)
        train, test = found.train, found.test
        if test is None:
            if self.test_images is None:
                raise UserError(
                    "data.test_images: no images are for testing; give a number or a share (0.2x)"
                )
            aside, rest = set_aside(self.test_images, len(train))
            test, train = (tuple(train[i] for i in x.sort().values.tolist()) for x in (aside, rest))
            log.info(
                "data: %d of %d images are set aside for testing", len(aside), len(found.train)
            )
        parts = self.split(len(train), found.validation is None)
        watched, calibration, training = ([train[i] for i in part.tolist()] for part in parts)
        unreadable = Unreadable(self.skip_unreadable_images)

        def batches(
            samples: Sequence[Sample], at_least: int = 1, shuffle: bool = False
        ) -> FolderBatches:
            size = loading.batch_size if shuffle else loading.eval_batch_size
            return FolderBatches(
                samples,
                self._augmenting() if shuffle else self._plain(),
                settings=self,
                plan=BatchPlan(len(samples), size, at_least),
                loading=loading,
                shuffle=shuffle,
                unreadable=unreadable,
            )

        counts = Counter(target for _, target in training)
        return ImageData(
            name=self.name,
            num_classes=len(found.classes),
            image_shape=(3, self.image_size, self.image_size),
            fingerprint=_fingerprint(found, unreadable),
            train=batches(training, loading.at_least, shuffle=True),
            calibration=batches(calibration, at_least=2),
            validation=batches(found.validation or watched),
            test=batches(test),
            class_names=tuple(map(shown, found.classes)),
            pixels=Pixels(
                tuple(255 * x for x in MEAN), tuple(255 * x for x in STD), resize=self.resize
            ),
            class_counts=tuple(counts[target] for target in range(len(found.classes))),
        )

    def _augmenting(self) -> v2.Compose:
        crop = v2.RandomResizedCrop(self.image_size, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def _plain(self) -> v2.Compose:
        resize = v2.Resize(self.resize, antialias=True)
        return v2.Compose([resize, v2.CenterCrop(self.image_size), v2.PILToTensor()])

    def _check_memory(self, loading: Loading) -> None:
        """Refuses batches that would not fit into memory, before one is made.

        Raises:
            UserError: Says how large one would be.
        """
        images = max(loading.batch_size, loading.eval_batch_size)
        needed = images * 3 * self.image_size**2 * 4
        if needed > MAX_BATCH_BYTES:
            raise UserError(
                f"data.image_size: a batch of {images:,} images of {self.image_size} × "
                f"{self.image_size} takes {needed / 1e9:,.1f} GB, and at most "
                f"{MAX_BATCH_BYTES / 1e9:g} GB are allowed; choose smaller images or batches "
                "(trainer.batch_size, trainer.eval_batch_size)"
            )


def _fingerprint(found: Listed, unreadable: Unreadable) -> str:
    """SHA-256 of paths, classes and sizes of all files.

    Raises:
        UserError: More files than allowed are empty or lead nowhere.
    """
    digest = hashlib.sha256()
    for path, target in (*found.train, *(found.validation or ()), *(found.test or ())):
        size = -1
        try:
            size = file_size(path)
        except UnreadableError as error:
            unreadable.add(Broken(path, str(error)))
        name = os.fsencode(os.path.relpath(path, found.folder))
        digest.update(name + f" {target} {size}\n".encode())
    return digest.hexdigest()
