"""What each quantizer alone costs, against copying the bytes that it must move.

    python scripts/bench_quantizers.py --bits 2 3 4 8 --json

Inputs: forward and backward of (N, C, H, W) values. The forward pass must read and write 4 bytes a
value, the backward pass read 8 and write 4: 20 bytes, as much as a copy of 2.5 tensors of that
size moves. Weights: forward, and the adaptation after a step; forward alone must move 8 bytes a
value. All rows are interleaved; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from bench_step import machine
from torch import Tensor

from adq_train.quantization import kernels
from adq_train.run.session import composed
from adq_train.settings.validate import Parts

INPUTS = ("n2uq", "lsq", "pact", "dorefa", "apot")
WEIGHTS = ("adq", "n2uq", "lsq", "dorefa", "apot")


def parts_of(group: str, name: str) -> Parts:
    """A run's parts with one quantizer chosen."""
    return composed([f"{group}={name}"])[1]


def input_pass(name: str, bits: int, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward of an activation quantizer, calibrated on its input."""
    quantizer = parts_of("activation_quantizer", name).make_activation_quantizer(bits).to(x.device)
    quantizer.calibrate(x.flatten()[: 2**16])
    x = x.detach().requires_grad_()

    def once() -> None:
        x.grad = None
        quantizer.zero_grad(set_to_none=True)
        quantizer(x).backward(grad)

    return once


def weight_pass(name: str, bits: int, weight: Tensor) -> Callable[[], None]:
    """Forward of a weight quantizer, and its adaptation."""
    quantizer = parts_of("weight_quantizer", name).make_weight_quantizer(bits).to(weight.device)
    quantizer.calibrate(weight)

    def once() -> None:
        quantizer(weight)
        quantizer.adapt(weight)

    return once


def without_kernels(once: Callable[[], None]) -> Callable[[], None]:
    """The same as on a machine without a compiler."""

    def plain() -> None:
        with mock.patch.object(kernels, "library", return_value=None):
            once()

    return plain


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each quantizer, bit-width and path."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    x = torch.randn(options.shape, device=device).relu()
    grad = torch.randn(options.shape, device=device)
    weight = torch.randn(options.weight_shape, device=device)
    source = torch.randn(x.numel() * 5 // 2, device=device)
    weight_target, target = torch.empty_like(weight), torch.empty_like(source)
    copies = {"input": lambda: target.copy_(source), "weight": lambda: weight_target.copy_(weight)}
    plan: dict[tuple[str, str, int], Callable[[], Any]] = {
        (f"copy of the {kind}'s bytes", kind, 0): copy for kind, copy in copies.items()
    }
    for bits in options.bits:
        for name in INPUTS:
            plan[name, "input", bits] = input_pass(name, bits, x, grad)
        for name in WEIGHTS:
            plan[name, "weight", bits] = weight_pass(name, bits, weight)
        plan["n2uq_plain", "input", bits] = without_kernels(plan["n2uq", "input", bits])
        plan["adq_plain", "weight", bits] = without_kernels(plan["adq", "weight", bits])
    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in plan}
    for _ in range(options.rounds + 1):
        for key, once in plan.items():
            began = time.perf_counter()
            once()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[key].append(time.perf_counter() - began)
    medians = {key: statistics.median(taken[1:]) for key, taken in times.items()}
    copied = {kind: seconds for (_, kind, bits), seconds in medians.items() if not bits}
    return [
        {
            "name": name,
            "of": kind,
            "bits": bits,
            "median_ms": 1e3 * seconds,
            "ratio_to_copy": seconds / copied[kind],
        }
        for (name, kind, bits), seconds in medians.items()
    ]


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--shape", type=int, nargs=4, default=[128, 16, 32, 32], metavar="N")
    words.add_argument("--weight-shape", type=int, nargs=4, default=[256, 256, 3, 3], metavar="N")
    words.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    words.add_argument("--rounds", type=int, default=11)
    words.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    words.add_argument("--json", action="store_true", help="print one line of JSON")
    options = words.parse_args()
    rows = measure(options)
    facts = {"shape": options.shape, "weight_shape": options.weight_shape, "machine": machine()}
    if options.json:
        print(json.dumps({**facts, "rows": rows}))
        return
    print(json.dumps(facts))
    print("| quantizer | of | bits | ms | times the copy |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['of']} | {row['bits'] or ''} | {row['median_ms']:.2f} | "
            f"{row['ratio_to_copy']:.2f} |"
        )


if __name__ == "__main__":
    main()
