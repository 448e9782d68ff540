"""What one training step costs: float, ADQ, rivals; time as a multiple of the float step.

    python scripts/bench_step.py --model resnet20 --shape 3 32 32 --batch-size 128 --json

Forward, backward, optimizer step and adaptation of the codebooks on random images, all methods in
one process: rounds over all rows are interleaved, so that a slow moment of the machine meets every
row. Reported is the median over the rounds, and the median of the ratios to the float step of the
same round with the range that holds half of them. Memory is the peak of a process of its own above
what it takes before it builds the model (with --device=cuda: the allocator's peak).

A method is a file of configs/comparison; ``brevitas`` needs the extra ``bench``: Brevitas' own
layers with learned scales for weights and inputs. ``adq_plain`` is ADQ without the C kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq_train.artifacts import LayerBits
from adq_train.quantization import kernels
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.prepare import Upkeep, collect_inputs, quantize_layer, swap
from adq_train.run.session import composed
from adq_train.settings.validate import Parts
from adq_train.training.optimizers import parameter_groups

METHODS = ("adq", "n2uq", "lsq", "pact", "dorefa", "apot")


def parts_of(options: argparse.Namespace, method: str) -> Parts:
    """The model and the quantizers of a method, from the configuration."""
    chosen = [] if method in ("float", "brevitas") else [f"comparison={method.split('_')[0]}"]
    return composed([f"model={options.model}", *chosen, *options.settings])[1]


def build(options: argparse.Namespace, method: str, bits: int, images: Tensor) -> nn.Module:
    """The network of one row, on its device, in training mode."""
    torch.manual_seed(0)
    parts = parts_of(options, method)
    model = parts.model.build(options.classes, images.shape[1]).to(images.device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if method == "brevitas":
        swap(model, brevitas_layers(model, bits))
        model.to(images.device)
    elif method != "float":
        names = [x.name for x in describe_layers(model, images[:1])]
        inputs = collect_inputs(model, names, [images[:16]], seed=0)
        makers = parts.make_weight_quantizer, parts.make_activation_quantizer
        for name in names:
            swap(model, quantize_layer(model, LayerBits(name, bits, bits), *makers, inputs, 0))
    return model.train()


def brevitas_layers(model: nn.Module, bits: int) -> dict[str, nn.Module]:
    """Brevitas' quantized form of every convolution and linear layer."""
    from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear

    layers: dict[str, nn.Module] = {}
    for name, old in model.named_modules():
        common = {"bias": getattr(old, "bias", None) is not None, "weight_bit_width": bits}
        if isinstance(old, nn.Conv2d):
            shape = (old.in_channels, old.out_channels, old.kernel_size)
            geometry = {"stride": old.stride, "padding": old.padding, "groups": old.groups}
            new = QuantConv2d(*shape, **geometry, **common)
        elif isinstance(old, nn.Linear):
            new = QuantLinear(old.in_features, old.out_features, **common)
        else:
            continue
        new.load_state_dict(old.state_dict(), strict=False)
        layers[name] = nn.Sequential(QuantIdentity(bit_width=bits), new)
    return layers


@contextmanager
def conditions(options: argparse.Namespace, method: str) -> Iterator[None]:
    """Autocast where asked for, and no kernels where the row says so."""
    low = options.precision == "bf16"
    off = mock.patch.object(kernels, "library", return_value=None)
    with torch.autocast(options.device, torch.bfloat16, enabled=low):
        if method.endswith("_plain"):
            with off:
                yield
        else:
            yield


def stepper(
    options: argparse.Namespace, method: str, bits: int, images: Tensor, targets: Tensor
) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    model = build(options, method, bits, images)
    upkeep = Upkeep(model)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.01, 1e-4), momentum=0.9)
    forward = torch.compile(model) if options.compile else model

    def wait() -> None:
        if images.is_cuda:
            torch.cuda.synchronize()

    def step() -> float:
        wait()
        began = time.perf_counter()
        with conditions(options, method):
            loss = F.cross_entropy(forward(images), targets)
        with conditions(options, method), torch.autocast(options.device, enabled=False):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            upkeep.before_step()
            optimizer.step()
            upkeep.after_step()
        wait()
        return time.perf_counter() - began

    return step


def batch(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random images and targets."""
    torch.manual_seed(0)
    images = torch.randn(options.batch_size, *options.shape, device=options.device)
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(options.classes, (options.batch_size,), device=options.device)


def resident(field: str) -> int:
    """Bytes, from this process' status: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))


def own_peak(options: argparse.Namespace, method: str, bits: int) -> int:
    """Bytes that building and three steps of one row add to this process."""
    images, targets = batch(options)
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    nn.Conv2d(3, 4, 3)(torch.zeros(1, 3, 8, 8))  # what torch itself takes at its first one
    before = resident("VmRSS")
    step = stepper(options, method, bits, images, targets)
    for _ in range(1, 4):
        step()
    return torch.cuda.max_memory_allocated() if images.is_cuda else resident("VmHWM") - before


def peak_elsewhere(method: str, bits: int) -> int:
    """:func:`own_peak` in a process of its own with this command's options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--own-peak", f"{method}:{bits}"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for float and one for each method and bit-width."""
    methods = list(options.methods)
    if "brevitas" in methods and importlib.util.find_spec("brevitas") is None:
        print("no rows for brevitas: pip install 'adq-train[bench]'", file=sys.stderr)
        methods.remove("brevitas")
    plan = [("float", 32), *((m, b) for m in methods for b in options.bits)]
    images, targets = batch(options)
    steps = [stepper(options, *row, images, targets) for row in plan]
    times: list[list[float]] = [[] for _ in plan]
    for _ in range(1, options.rounds + 3):
        for step, taken in zip(steps, times, strict=True):
            taken.append(step())
    rows = []
    for (name, bits), taken in zip(plan, times, strict=True):
        # The first two rounds warm up.
        ratios = sorted(a / b for a, b in zip(taken[2:], times[0][2:], strict=True))
        rows.append(
            {
                "name": name,
                "bits": bits,
                "median_ms": 1e3 * statistics.median(taken[2:]),
                "ratio_to_float": statistics.median(ratios),
                "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
                "peak_memory_bytes": peak_elsewhere(name, bits) if options.memory else None,
            }
        )
    return rows


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": kernels.library() is not None,
    }


def parsed() -> argparse.Namespace:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--model", default="resnet20", help="a file of configs/model")
    words.add_argument("--shape", type=int, nargs=3, default=[3, 32, 32], metavar=("C", "H", "W"))
    words.add_argument("--classes", type=int, default=10)
    words.add_argument("--batch-size", type=int, default=128)
    words.add_argument("--methods", nargs="+", default=["adq"], help=f"of {METHODS}, brevitas")
    words.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    words.add_argument("--rounds", type=int, default=15)
    words.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    words.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    words.add_argument("--channels-last", action="store_true")
    words.add_argument("--compile", action="store_true", help="torch.compile every row's model")
    words.add_argument("--memory", action="store_true", help="measure the peak memory too")
    words.add_argument("--own-peak", help=argparse.SUPPRESS)
    words.add_argument("--json", action="store_true", help="print one line of JSON")
    words.add_argument("settings", nargs="*", help="more settings of adq-train, after --")
    return words.parse_args()


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown."""
    yield "| method | bits | ms | times float | half of the rounds | peak memory, MB |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        low, high = row["ratio_quartiles"]
        peak = row["peak_memory_bytes"]
        yield (
            f"| {row['name']} | {row['bits']} | {row['median_ms']:.1f} | "
            f"{row['ratio_to_float']:.2f} | {low:.2f} to {high:.2f} | "
            f"{'' if peak is None else f'{peak / 1e6:.0f}'} |"
        )


def main() -> None:
    options = parsed()
    if options.own_peak:
        method, bits = options.own_peak.split(":")
        print(own_peak(options, method, int(bits)))
        return
    facts = {"device": options.device, "model": options.model, "batch_size": options.batch_size}
    rows = measure(options)
    if options.json:
        print(json.dumps({**facts, "machine": machine(), "rows": rows}))
    else:
        print(json.dumps({**facts, "machine": machine()}))
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
