"""Times the perturbation metric with and without the reuse of what lies before each layer.

    OMP_NUM_THREADS=1 python scripts/bench_profile.py --json

A CIFAR ResNet on random images; both ways in turn, medians over the repetitions. Ends
with an error if the two tables differ in any bit. ``ratio_to_float`` counts float passes over the
same images, ``ratio_to_whole`` compares the two ways; ``cpu_ratio_to_whole`` does so by the CPU
time of the process, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from adq_train.data.synthetic import SHAPES, generate
from adq_train.models import CifarResNet
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.sensitivity.base import Conditions
from adq_train.sensitivity.perturbation import Perturbation

KEPT_BYTES = {"whole": 0, "reuse": 1_000_000_000}


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float, Any]:
    """Milliseconds on the clock and of the CPU, and what the work returns."""
    began, cpu_began = time.perf_counter(), time.process_time()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    cpu = time.process_time() - cpu_began
    return 1000 * (time.perf_counter() - began), 1000 * cpu, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet, 6 n + 2")
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)

    torch.manual_seed(0)
    model = CifarResNet(options.depth, 16, 10, 3).eval().to(device)
    pixels, targets = generate(options.images, SHAPES["cifar10"], seed=0)
    images = (pixels.float() / 128 - 1).to(device)
    targets = targets.to(device)
    size = options.batch_size
    batches = list(zip(images.split(size), targets.split(size), strict=True))
    layers = describe_layers(model, images[:1])

    def measure(kept_bytes: int) -> list[Any]:
        metric = Perturbation(kept_bytes=kept_bytes)
        make = AdqWeightQuantizer, N2uqActivationQuantizer
        return list(metric.measure(model, layers, Conditions(options.bits, batches, *make)))

    @torch.no_grad()
    def forward() -> None:
        for batch, _ in batches:
            model(batch)

    forward()
    times: dict[str, list[float]] = {"float": [], **{name: [] for name in KEPT_BYTES}}
    cpu_times: dict[str, list[float]] = {name: [] for name in times}
    memory: dict[str, int | None] = dict.fromkeys(times)
    tables = {}
    for _ in range(options.repetitions):
        times["float"].append(timed(forward, device)[0])
        for name, kept_bytes in KEPT_BYTES.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took, cpu, tables[name] = timed(partial(measure, kept_bytes), device)
            times[name].append(took)
            cpu_times[name].append(cpu)
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated()
        if tables["whole"] != tables["reuse"]:
            raise SystemExit("the two ways give different numbers")

    medians = {name: statistics.median(values) for name, values in times.items()}
    cpu = {name: statistics.median(cpu_times[name]) for name in KEPT_BYTES}
    rows = [
        {
            "name": name,
            "bits": options.bits if name in cpu else None,
            "median_ms": round(median, 1),
            "ratio_to_float": round(median / medians["float"], 3),
            "ratio_to_whole": round(median / medians["whole"], 3) if name in cpu else None,
            "cpu_ratio_to_whole": round(cpu[name] / cpu["whole"], 3) if name in cpu else None,
            "peak_memory_bytes": memory[name],
        }
        for name, median in medians.items()
    ]
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    result = {
        "device": f"{name}, {torch.get_num_threads()} threads",
        "model": f"resnet{options.depth}",
        "layers": len(layers),
        "batch_size": options.batch_size,
        "num_images": options.images,
        "repetitions": options.repetitions,
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result))
        return
    for row in rows:
        print(f"{row['name']:6} {row['median_ms']:10.1f} ms  {row['ratio_to_whole'] or '':>6}")


if __name__ == "__main__":
    main()
