"""How fast training goes, and whether it waits for its data."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from adq_train.data.base import ALL, Batch, Batches


@dataclass(frozen=True)
class Throughput:
    """Images per second, share of the time spent waiting for data, and memory at its peak."""

    images_per_second: float
    data_wait_percent: float
    peak_memory_bytes: int


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has allocated on a GPU, or had resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class TimedBatches:
    """Batches, with the time that their consumer waits for them.

    Images are those of whole batches: all that the processes of a run train on together.

    Args:
        batches: Handed on as they are.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.images = 0
        self.waited = 0.0
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.batches)

    def size(self, index: int) -> int:
        """The number of images in batch ``index``."""
        return self.batches.size(index)

    def epoch(self, epoch: int, batches: slice = ALL, images: slice = ALL) -> Iterator[Batch]:
        """Some batches of one epoch."""
        source = self.batches.epoch(epoch, batches, images)
        numbers = iter(range(*batches.indices(len(self))))
        while True:
            began = time.perf_counter()
            batch = next(source, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            self.images += self.size(next(numbers))
            self.device = batch[0].device
            yield batch

    def throughput(self, seconds: float) -> Throughput:
        """What was measured since the start, given the time that all of it took."""
        seconds = max(seconds, 1e-9)
        return Throughput(
            self.images / seconds, 100 * self.waited / seconds, peak_memory_bytes(self.device)
        )


def duration(seconds: float) -> str:
    """A time in words: ``40 s``, ``12 min``, ``3.5 h`` or ``2.1 d``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86400:.1f} d"
