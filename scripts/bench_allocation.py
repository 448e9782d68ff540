"""Time of the exact bit allocation on made-up networks, by layers, bit-widths and budgets.

    python scripts/bench_allocation.py                      # a table of growing sizes
    python scripts/bench_allocation.py --layers 500 --json

Each instance has layers of 10^3 to 2.4 x 10^6 weights and sensitivities that fall fourfold with
every bit, as a squared error does; both budgets bind. Every allocation is proven optimal, or the
last column says how many are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Budget, Problem
from adq_train.allocation.ilp import IlpAllocator
from adq_train.artifacts import LayerInfo, LayerSensitivity, SensitivityTable

SIZES = ((20, 3), (20, 7), (100, 3), (100, 7), (500, 3), (500, 7))


def instance(
    num_layers: int, num_widths: int, num_budgets: int, separate: bool, seed: int
) -> tuple[Problem, SensitivityTable]:
    """A network with sizes, sensitivities and budgets drawn from ``seed``."""
    random = np.random.default_rng(seed)
    widths = tuple(range(2, 2 + num_widths))
    weights = np.exp(random.uniform(np.log(1e3), np.log(2.4e6), num_layers)).astype(int)
    reuse = np.exp(random.uniform(0, np.log(1e3), num_layers))
    inputs = np.exp(random.uniform(np.log(1e3), np.log(1e6), num_layers)).astype(int)
    layers = tuple(
        LayerInfo(f"layer{i}", n, int(n * r), a)
        for i, (n, r, a) in enumerate(zip(weights.tolist(), reuse, inputs.tolist(), strict=True))
    )

    def column() -> list[dict[int, float]]:
        level = np.exp(random.normal(0, 1.5, num_layers))
        noise = np.exp(random.normal(0, 0.2, (num_layers, num_widths)))
        return [
            {b: float(s * 4.0**-b * e) for b, e in zip(widths, row, strict=True)}
            for s, row in zip(level, noise, strict=True)
        ]

    of_weights = column()
    of_inputs = column() if separate else [None] * num_layers
    table = SensitivityTable(
        "made-up",
        widths,
        tuple(
            LayerSensitivity(x.name, x.num_weights, x.macs, w, a)
            for x, w, a in zip(layers, of_weights, of_inputs, strict=True)
        ),
    )
    problem = Problem(layers, {}, widths, Budget(), tied=not separate)
    amounts = {}
    for name, share in (("model_size_bytes", 0.4), ("bops", 0.2), ("average_activation_bits", 0.5)):
        (limit,) = replace(problem, budget=Budget(**{name: 0})).limits()
        least, most = (
            limit.total(layers, {x.name: problem.options(x)[end] for x in layers})
            for end in (0, -1)
        )
        amounts[name] = (least + share * (most - least)) / limit.unit
    budget = Budget(**dict(list(amounts.items())[:num_budgets]))
    return replace(problem, budget=budget), table


def measure(
    num_layers: int, num_widths: int, num_budgets: int, separate: bool, seeds: int
) -> dict[str, object]:
    """One row: seconds over some seeds."""
    seconds, cpu_seconds, unproven = [], [], 0
    for seed in range(seeds):
        problem, table = instance(num_layers, num_widths, num_budgets, separate, seed)
        began, cpu_began = time.perf_counter(), time.process_time()
        with quiet():
            allocation = allocate(IlpAllocator(), problem, table)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        unproven += not allocation.optimal
    return {
        "name": f"{num_layers}x{num_widths}x{num_budgets}" + ("-separate" if separate else ""),
        "layers": num_layers,
        "bit_widths": num_widths,
        "budgets": num_budgets,
        "separate": separate,
        "seeds": seeds,
        "median_s": statistics.median(seconds),
        "max_s": max(seconds),
        "median_cpu_s": statistics.median(cpu_seconds),
        "max_cpu_s": max(cpu_seconds),
        "unproven": unproven,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the solver's C++ code prints away from standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--layers", type=int, help="one size instead of the table of sizes")
    words.add_argument("--bit-widths", type=int, default=7, choices=range(1, 8))
    words.add_argument("--budgets", type=int, default=2, choices=(1, 2, 3))
    words.add_argument("--separate", action="store_true", help="weights and inputs apart")
    words.add_argument("--seeds", type=int, default=5, help="instances of each size")
    words.add_argument("--json", action="store_true", help="print one JSON object")
    options = words.parse_args()
    sizes = [(options.layers, options.bit_widths)] if options.layers else SIZES
    rows = []
    for layers, widths in sizes:
        row = measure(layers, widths, options.budgets, options.separate, options.seeds)
        rows.append(row)
        if not options.json:
            if len(rows) == 1:
                print("layers  bit-widths  budgets  median s     max s  max CPU s  not proven")
            print(
                f"{layers:6}  {widths:10}  {options.budgets:7}  {row['median_s']:8.3f}  "
                f"{row['max_s']:8.3f}  {row['max_cpu_s']:9.3f}  "
                f"{row['unproven']:2} of {options.seeds}",
                flush=True,
            )
    if options.json:
        print(json.dumps({"device": "cpu", "model": "made-up", "rows": rows}))


if __name__ == "__main__":
    main()
