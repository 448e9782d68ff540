"""Latency and memory of inference on the CPU: float32 and quantized, PyTorch and onnxruntime.

    python scripts/bench_inference.py --model resnet20 --bits 4 --batch-size 1 --json

The network is a CIFAR ResNet or, as resnet18, torchvision's for 224 × 224, with random weights,
calibrated on random images: the time does not depend on what it has learned. Rounds over all rows
are interleaved, so that a slow moment of the machine meets every row; the median of the rounds is
reported. Memory is the peak of a process of its own, above what the same process takes before it
loads the model.

Rows: ``float`` (eager), ``packed`` (weights unpacked at load), ``packed_codes`` (weights stay
codes of one byte), ``onnx_float``, ``onnx`` (what ``adq-export format=onnx`` writes), ``qdq``
(``format=qdq``, of the network as ``target=int8`` makes it). ``--rows`` chooses among them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.artifacts import BitAllocation, LayerBits
from adq_train.data.base import InputFormat
from adq_train.deploy.apart import FileHere
from adq_train.deploy.architecture import build_network
from adq_train.deploy.integer import integer_network
from adq_train.deploy.layer_tables import tables_of
from adq_train.deploy.model import TableModel, float_state
from adq_train.deploy.onnx import onnx_bytes
from adq_train.deploy.packed import load_packed, packed_bytes
from adq_train.deploy.qdq import QdqGraph
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.lsq import LsqActivationQuantizer
from adq_train.quantization.n2uq import N2uqActivationQuantizer, N2uqWeightQuantizer
from adq_train.quantization.prepare import collect_inputs, prepare, quantized_layers
from adq_train.quantization.target import Int8Target
from adq_train.training.calibration import calibrated

ROWS = ("float", "packed", "packed_codes", "onnx_float", "onnx", "qdq")


FILES = {
    "float": "float.pt", "onnx_float": "float.onnx", "onnx": "model.onnx", "qdq": "model.qdq.onnx",
}  # fmt: skip


def source_of(name: str) -> tuple[dict[str, Any], tuple[int, int, int], int]:
    """The config section of a network, the shape of its images, and its number of classes."""
    if name == "resnet18":
        node = {"_target_": "adq_train.models.TorchvisionModel", "name": name, "weights": None}
        return node, (3, 224, 224), 1000
    depth = int(name.removeprefix("resnet"))
    node = {"_target_": "adq_train.models.CifarResNetModel", "depth": depth, "width": 16}
    return node, (3, 32, 32), 10


def make_files(name: str, bits: int, folder: Path) -> None:
    """Writes the same network in its forms."""
    node, shape, classes = source_of(name)
    network = build_network(node, classes, shape[0])
    torch.save(network.state_dict(), folder / "float.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (torch.zeros(2, *shape),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    (folder / "float.onnx").write_bytes(program.model_proto.SerializeToString())
    images = torch.randn(4, *shape)
    names = [x.name for x in describe_layers(network, images[:1])]
    layers = tuple(LayerBits(name, bits, bits) for name in names)
    allocation = BitAllocation("uniform", {}, layers, 0, 0, 0, 0, 0, 0, False)
    target = Int8Target()
    make = target.makers((N2uqWeightQuantizer, LsqActivationQuantizer))
    integer = integer_network(calibrated(network, allocation, make, [images], 0, target).eval())
    (folder / "model.qdq.onnx").write_bytes(QdqGraph(integer, images).model().SerializeToString())
    inputs = collect_inputs(network, names, [images], seed=0)
    prepare(network, allocation, AdqWeightQuantizer, N2uqActivationQuantizer, inputs, seed=0)
    quantized = quantized_layers(network)
    model = TableModel(
        node,
        {},
        InputFormat(classes, shape),
        {name: tables_of(name, layer) for name, layer in quantized.items()},
        {k: v.detach() for k, v in float_state(network, quantized).items()},
    )
    (folder / "model.safetensors").write_bytes(packed_bytes(model)[0])
    (folder / "model.onnx").write_bytes(onnx_bytes(model))


def load(name: str, model: str, folder: Path) -> nn.Module:
    """The network in one of its forms."""
    if name == "float":
        node, shape, classes = source_of(model)
        network = build_network(node, classes, shape[0])
        network.load_state_dict(torch.load(folder / "float.pt", weights_only=True))
        return network
    if name.startswith("packed"):
        return load_packed(folder / "model.safetensors", unpack_weights=name == "packed")
    return FileHere(folder / FILES[name], "onnxruntime")


def file_bytes(name: str, folder: Path) -> int:
    """The size of the file that a row is loaded from."""
    return (folder / FILES.get(name, "model.safetensors")).stat().st_size


@torch.no_grad()
def seconds(network: nn.Module, images: Tensor) -> float:
    """The time of one forward pass."""
    began = time.perf_counter()
    network(images)
    return time.perf_counter() - began


@torch.no_grad()
def peak_memory(name: str, model: str, folder: Path, images: Tensor) -> int:
    """Bytes that loading and running a row adds to the peak of this process."""
    nn.Conv2d(3, 4, 3)(images)  # what torch itself takes at its first convolution
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_bytes("VmRSS")
    network = load(name, model, folder)
    for _ in range(3):
        network(images)
    return status_bytes("VmHWM") - before


def cpu_name() -> str:
    """The processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def status_bytes(field: str) -> int:
    """A figure of Linux about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:"))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows, in the form that other programs read."""
    make_files(arguments.model, arguments.bits, folder)
    images = torch.randn(arguments.batch_size, *source_of(arguments.model)[1])
    networks = {name: load(name, arguments.model, folder) for name in arguments.rows}
    for network in networks.values():
        for _ in range(3):
            seconds(network, images)
    times: dict[str, list[float]] = {name: [] for name in arguments.rows}
    for _ in range(arguments.rounds):
        for name, network in networks.items():
            times[name].append(seconds(network, images))
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    rows = []
    for name in arguments.rows:
        command = [sys.executable, __file__, "--memory-of", name, "--folder", str(folder)]
        command += ["--model", arguments.model, "--batch-size", str(arguments.batch_size)]
        command += ["--threads", str(arguments.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(
            {
                "name": name,
                "bits": 32 if "float" in name else arguments.bits,
                "median_ms": medians[name],
                "ratio_to_first": medians[name] / medians[arguments.rows[0]],
                "peak_memory_bytes": int(done.stdout),
                "file_bytes": file_bytes(name, folder),
            }
        )
    return {
        "device": f"{cpu_name()}, {arguments.threads} threads",
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20", help="resnet8 … resnet56, or resnet18")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--memory-of", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        images = torch.randn(arguments.batch_size, *source_of(arguments.model)[1])
        print(peak_memory(arguments.memory_of, arguments.model, arguments.folder, images))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['model']}, batch of {result['batch_size']}, {result['device']}")
    print(f"{'':14}{'bits':>5}{'median ms':>11}{'× first':>9}{'memory MB':>11}{'file kB':>9}")
    for row in result["rows"]:
        print(
            f"{row['name']:14}{row['bits']:5}{row['median_ms']:11.2f}{row['ratio_to_first']:9.2f}"
            f"{row['peak_memory_bytes'] / 1e6:11.1f}{row['file_bytes'] / 1e3:9.1f}"
        )


if __name__ == "__main__":
    main()
