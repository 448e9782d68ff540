"""All that only a GPU can show of this project, in one command under ten minutes; JSON to a file.

    python scripts/gpu_day.py --output gpu_day.json

Rows, each written as soon as it is there: what a copy reaches; the training step of ResNet-18 on
made-up images (bf16, channels last, fused optimizers, first and last layer at 8 bits), float and
quantized, eager and compiled, with launches, waits and peak memory; Triton's kernels against the
plain form and against the bytes that they must move; whether two deterministic trainings, and one
that was interrupted, end with the same bits; whether two GPUs do, by NCCL. What fails says why in
its row, and the rest goes on. ``--device cpu --dry`` tries every row with a few small images.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn

from adq_train.artifacts import LayerBits
from adq_train.data.base import ALL, ImageData
from adq_train.quantization import gpu_kernels, steps
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.prepare import collect_inputs, quantize_layer, swap
from adq_train.settings.schema import TrainerConfig
from adq_train.training.device import use
from adq_train.training.distributed import ALONE, Ranks, joined
from adq_train.training.health import FiniteWatch
from adq_train.training.optimizers import make_optimizers
from adq_train.training.trainer import Trainer

Row = dict[str, Any]


class Bench:
    """Where and on what is measured, and the rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.dry = options.dry
        self.batch, self.side = (2, 8) if options.dry else (options.batch_size, 224)
        self.classes = 10 if options.dry else 1000
        self.steps, self.rounds = (1, 1) if options.dry else (20, 3)
        self.output, self.rows = Path(options.output), list[Row]()
        numbers = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.side, self.side, generator=numbers)
        self.images = images.to(self.device)
        self.targets = torch.randint(self.classes, (self.batch,), generator=numbers).to(self.device)

    def wait(self) -> None:
        """Until the GPU has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def note(self, what: str, measure: Callable[[], Row], **about: Any) -> None:
        """Measures a row and writes all of them; an error is what the row says then."""
        began = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # the day goes on
            found = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        seconds = round(time.perf_counter() - began, 2)
        row = {"what": what, **about, **found, "row_seconds": seconds}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.output.write_text(json.dumps(self.rows, indent=1) + "\n")
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def milliseconds(self, act: Callable[[], object], times: int) -> float:
        """Of one of some acts that follow one another without a wait; median of the rounds."""
        found = []
        for _ in range(self.rounds):
            self.wait()
            began = time.perf_counter()
            for _ in range(times):
                act()
            self.wait()
            found.append(1e3 * (time.perf_counter() - began) / times)
        return statistics.median(found)


class Same:
    """Batches that are one, however often."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.batch = images, targets

    def __len__(self) -> int:
        return 1

    def size(self, index: int) -> int:
        """Its images."""
        return len(self.batch[1])

    def epoch(
        self, epoch: int, batches: slice = ALL, images: slice = ALL
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """That one."""
        yield self.batch[0][images], self.batch[1][images]


def small() -> nn.Module:
    """Three layers, of which the middle one has few bits."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


def network(bench: Bench, bits: int | None) -> nn.Module:
    """ResNet-18, or a small one for a dry run, float or quantized with ADQ's defaults."""
    torch.manual_seed(0)
    model = (small() if bench.dry else torchvision.models.resnet18()).to(bench.device)
    if bits is not None:
        names = [x.name for x in describe_layers(model, bench.images[:1])]
        inputs = collect_inputs(model, names, [bench.images[:8]], seed=0)
        for name in names:
            width = 8 if name in (names[0], names[-1]) else bits
            kinds = AdqWeightQuantizer, N2uqActivationQuantizer
            swap(model, quantize_layer(model, LayerBits(name, width, width), *kinds, inputs, 0))
    return model.train()


def trainer(
    bench: Bench, bits: int | None, compiled: bool = False, ranks: Ranks = ALONE
) -> Trainer:
    """As experiment=resnet18_imagenet trains."""
    model = network(bench, bits)
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True)
    adam = partial(torch.optim.Adam, lr=0.01, fused=True)
    parts = [Same(bench.images, bench.targets)] * 4
    return Trainer(
        model,
        make_optimizers(model, 0.01, 5e-5, sgd, adam),
        ImageData("made up", bench.classes, (3, bench.side, bench.side), "made up", *parts),
        [FiniteWatch()],
        settings=TrainerConfig(
            precision="bf16", channels_last=True, compile="model" if compiled else "none"
        ),
        ranks=ranks,
    )


def copy_roof(bench: Bench) -> Row:
    """Bytes a second of the plainest kernel, read and written."""
    x = torch.empty(2**16 if bench.dry else 2**28, device=bench.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    y.copy_(x)
    took = bench.milliseconds(lambda: y.copy_(x), 20)
    return {"ms": took, "tb_per_s": 4 * x.numel() / took / 1e9}


def step_row(bench: Bench, bits: int | None, compiled: bool) -> Row:
    """Time, memory, launches and waits of a training step."""
    by = trainer(bench, bits, compiled)
    cuda = bench.device.type == "cuda"

    def step() -> None:
        by.step(bench.images, bench.targets)

    began = time.perf_counter()
    for _ in range(3):
        step()
    bench.wait()
    row: Row = {"first_steps_seconds": time.perf_counter() - began}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    row["ms"] = bench.milliseconds(step, bench.steps)
    row["images_per_s"] = 1e3 * bench.batch / row["ms"]
    if cuda:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["waits"] = waits_of(step)
    return row | kernels_of(step, bench)


def waits_of(step: Callable[[], None]) -> int:
    """How often PyTorch itself says that the CPU waits."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(x.message) for x in told)


def kernels_of(step: Callable[[], None], bench: Bench) -> Row:
    """Launches of a step, and the kernels that take longest, in microseconds."""
    if bench.device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        bench.wait()
    events = [e for e in profile.events() if e.device_type.name == "CUDA"]
    longest: collections.Counter[str] = collections.Counter()
    for event in events:
        longest[event.name[:60]] += event.device_time
    return {"launches": len(events), "longest": longest.most_common(8)}


def kernel_row(bench: Bench, bits: int) -> Row:
    """The step function alone: the fast form beside the plain one, and beside its bytes."""
    torch.manual_seed(0)
    size = 4096 if bench.dry else bench.batch * 64 * 56 * 56
    quantizer = N2uqActivationQuantizer(bits).to(bench.device)
    x = torch.randn(size, device=bench.device).relu().bfloat16()
    quantizer.calibrate(x[:100_000])
    x.requires_grad_()
    grad = torch.randn_like(x)
    inputs = [x, *(p for p in quantizer.parameters() if p.requires_grad)]

    def results() -> list[Tensor]:
        y = quantizer(x)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    first, second = results(), results()
    with mock.patch.object(gpu_kernels, "usable", return_value=False):
        plain = results()
    pairs = zip(first, plain, strict=True)
    off = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs]
    edges = quantizer.edges().detach()
    widths, levels = edges.diff(), quantizer.levels()
    tables = edges, steps.midpoints(edges), widths, levels
    value = x.detach()
    forward = bench.milliseconds(lambda: steps.staircase(value, tables[1], levels), 20)
    backward = bench.milliseconds(lambda: steps.step_gradients(value, *tables, grad), 20)
    return {
        "largest_relative_difference": off,
        "repeats": all(map(torch.equal, first, second)),
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tb_per_s": 4 * size / forward / 1e9,
        "backward_tb_per_s": 6 * size / backward / 1e9,
    }


def digest(model: nn.Module) -> list[float]:
    return [float(x.double().sum()) for x in model.state_dict().values()]


def same_bits(bench: Bench) -> Row:
    """Two deterministic trainings, and a third that a checkpoint interrupts."""
    use(bench.device, deterministic=True)
    try:
        ends = []
        for interrupted in (False, False, True):
            by = trainer(bench, 2)
            for step in range(4):
                if interrupted and step == 2:
                    kept = copy.deepcopy((by.model.state_dict(), by.state_dict()))
                    by = trainer(bench, 2)
                    by.model.load_state_dict(kept[0])
                    by.load_state_dict(kept[1])
                by.step(bench.images, bench.targets)
            ends.append({k: v.clone() for k, v in by.model.state_dict().items()})
        same = [all(torch.equal(ends[0][k], e[k]) for k in ends[0]) for e in ends[1:]]
        return {"two_runs": same[0], "interrupted": same[1]}
    finally:
        use(bench.device)


def two_ranks(bench: Bench) -> Row:
    """The same training in two processes: both end with the same bits."""
    if bench.device.type == "cuda" and torch.cuda.device_count() < 2:
        return {"skipped": "one GPU"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    own = [__file__, "--device", bench.device.type, "--rank"] + ["--dry"] * bench.dry
    done = subprocess.run([*command, *own], capture_output=True, text=True, timeout=300)
    if done.returncode:
        return {"error": done.stderr[-400:]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def one_rank(options: argparse.Namespace) -> None:
    """What each of two processes does: its part of four steps, and a comparison."""
    with joined() as ranks:
        if options.device == "cuda":
            options.device = f"cuda:{ranks.local_rank}"
        bench = Bench(options)
        by = trainer(bench, 2, ranks=ranks)
        bench.wait()
        began = time.perf_counter()
        for _ in range(4):
            by.step(bench.images[ranks.own], bench.targets[ranks.own])
        bench.wait()
        took = 1e3 * (time.perf_counter() - began) / 4
        ends = ranks.all_gather(digest(by.model))
        if ranks.rank == 0:
            print(json.dumps({"same": all(end == ends[0] for end in ends), "ms": took}))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4, 8])
    parser.add_argument("--output", default="gpu_day.json")
    parser.add_argument("--dry", action="store_true", help="small images, one step of each")
    parser.add_argument("--alone", action="store_true", help="without the row of two processes")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank:
        one_rank(options)
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    bench = Bench(options)
    cuda = bench.device.type == "cuda"
    bench.note(
        "machine",
        lambda: {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(bench.device) if cuda else "cpu",
            **(gpu_kernels.in_use(bench.device) if cuda else {}),
        },
    )
    bench.note("copy", partial(copy_roof, bench))
    for bits in options.bits:
        bench.note("kernels", partial(kernel_row, bench, bits), bits=bits)
    for compiled in (False, True):
        if compiled and bench.dry:
            continue  # its first call takes a minute
        for bits in (None, *options.bits):
            row = partial(step_row, bench, bits, compiled)
            bench.note("step", row, bits=bits, compiled=compiled)
    bench.note("deterministic", partial(same_bits, bench))
    if not options.alone:
        bench.note("two processes", partial(two_ranks, bench))


if __name__ == "__main__":
    main()
