import time
from pathlib import Path

import pytest
import torch

from adq_train.data.base import ALL
from adq_train.training.throughput import TimedBatches, duration, peak_memory_bytes


class Slow:
    def __len__(self):
        return 3

    def size(self, index):
        return 8  # of which this process has four

    def epoch(self, epoch, batches=ALL, images=ALL):
        for index in range(3)[batches]:
            time.sleep(0.02)
            yield torch.full((4, 1), float(epoch)), torch.full((4,), index)


def test_waiting_is_what_the_batches_take_and_not_what_is_done_with_them():
    timed = TimedBatches(Slow())
    assert len(timed) == 3
    began = time.perf_counter()
    seen = []
    for images, targets in timed.epoch(5):
        assert images[0].item() == 5
        seen.append(targets[0].item())
        time.sleep(0.04)
    seconds = time.perf_counter() - began
    assert seen == [0, 1, 2]
    assert 0.06 <= timed.waited <= seconds - 0.12
    found = timed.throughput(seconds)
    assert found.images_per_second == pytest.approx(24 / seconds)
    assert found.data_wait_percent == pytest.approx(100 * timed.waited / seconds)
    assert found.peak_memory_bytes > 10**7  # PyTorch alone


def test_an_empty_epoch_has_a_throughput():
    assert TimedBatches(Slow()).throughput(0.0).images_per_second == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it there")
def test_the_peak_is_the_one_that_the_kernel_tells():
    found = peak_memory_bytes(torch.device("cpu"))
    text = Path("/proc/self/status").read_text()
    [kilobytes] = [int(x.split()[1]) for x in text.splitlines() if x.startswith("VmHWM")]
    assert found == pytest.approx(1024 * kilobytes, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (5400, "1.5 h"),
     (172_800, "2.0 d")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text
