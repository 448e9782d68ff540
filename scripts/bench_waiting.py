"""What a step takes while other processes use the cores, by how OpenMP's threads wait.

    python scripts/bench_waiting.py --busy 0 1 2

A QAT step of ResNet-8 (2 bits, 100 images, all cores' threads), each policy in processes of its
own, interleaved; printed is the mean time of a step of each process, in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import torch
from bench_step import build
from torch.nn import functional as F

from adq_train.quantization.prepare import Upkeep

POLICIES = ("ACTIVE", "PASSIVE")
SECONDS = 5


def measure() -> float:
    """The mean time of a step in this process, ms."""
    images, targets = torch.randn(100, 3, 32, 32), torch.randint(10, (100,))
    options = argparse.Namespace(model="resnet8", settings=[], classes=10, channels_last=False)
    model = build(options, "adq", 2, images)
    optimizer, upkeep = torch.optim.SGD(model.parameters(), lr=0.01), Upkeep(model)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        upkeep.after_step()

    step()
    step()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        step()
        steps += 1
    return 1000 * (time.perf_counter() - start) / steps


def main() -> None:
    """Prints one line for each number of busy processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure())
        return
    for count in arguments.busy:
        others = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)
        ]
        times: dict[str, list[int]] = {policy: [] for policy in POLICIES}
        for _ in range(arguments.rounds):
            for policy in POLICIES:
                told = subprocess.check_output(
                    [sys.executable, __file__, "--measure"],
                    env={**os.environ, "OMP_WAIT_POLICY": policy},
                )
                times[policy].append(round(float(told)))
        for other in others:
            other.kill()
        print(f"{count} busy processes, ms a step: {times}", flush=True)


if __name__ == "__main__":
    main()
