"""Latency and size of the integer network in LiteRT, beside float; and which codes it gets wrong.

    python scripts/bench_litert.py resnet20 --bits 4 --rounds 50
    python scripts/bench_litert.py rescaling

Networks have random weights and are calibrated on random images: the time does not depend on what
they have learned. Rounds over all rows are interleaved; the median of the rounds is reported.

Rows: ``onnx_float`` (onnxruntime, float32), ``litert_float`` (the same operations as ``tflite``,
in float32), ``tflite`` and ``tflm`` (what ``adq-export`` writes; the latter on the portable kernels
of TensorFlow Lite Micro, which are written for reading, not for speed).

``rescaling`` takes 256 codes from one step to another, by each operation that could, and counts
those that are not the nearest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import adq_train
from adq_train.deploy.apart import FileHere
from adq_train.deploy.integer import integer_network
from adq_train.deploy.tflite import program_of
from adq_train.deploy.tflite_file import Operation, Program, Value, file_bytes
from adq_train.deploy.tflm import compressed
from adq_train.models import CifarResNetModel, TorchvisionModel
from adq_train.quantization.describe import describe_layers

NETWORKS = {
    "resnet8": (CifarResNetModel(depth=8, width=16), 10, (1, 8, 8)),
    "resnet20": (CifarResNetModel(depth=20, width=16), 10, (3, 32, 32)),
    "resnet18": (TorchvisionModel(name="resnet18", weights=None), 1000, (3, 224, 224)),
}


def as_float(program: Program) -> Program:
    """The same layers in float32: without what only goes from one step to another.

    Good for its time alone: where saturation is the ReLU of the integers, this one has none.
    """
    known: dict[int, Value] = {id(program.input): program.input}
    operations = []
    for x in program.operations:
        constant = x.inputs[1].data if len(x.inputs) > 1 and x.inputs[1] else None
        moves = x.kind == "ADD" and constant is not None
        if x.kind in ("QUANTIZE", "DEQUANTIZE") or moves:
            known[id(x.output)] = known[id(x.inputs[0])]
            continue
        inputs = [known[id(v)] if id(v) in known else real(v) for v in x.inputs]
        known[id(x.output)] = output = Value(x.output.name, x.output.shape, "float32")
        operations.append(replace(x, version=1, inputs=tuple(inputs), output=output))
    return Program(tuple(operations), program.input, known[id(program.output)])


def real(value: Value) -> Value:
    """A constant in float, where it stands for float values."""
    if value.scale is None:
        return value
    along = [1] * len(value.shape)
    along[value.axis] = -1
    scale = np.asarray(value.scale).reshape(along if np.size(value.scale) > 1 else ())
    return Value(value.name, value.shape, "float32", data=value.data * scale)


def write_files(name: str, bits: int, folder: Path) -> torch.Tensor:
    """Writes a network in its forms; returns an image."""
    torch.manual_seed(0)
    model, classes, shape = NETWORKS[name]
    network, images = model.build(classes, shape[0]).eval(), torch.randn(4, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (images[:1],), dynamo=True, verbose=False)
    (folder / "onnx_float").write_bytes(program.model_proto.SerializeToString())
    names = [x.name for x in describe_layers(network, images[:1])]
    quantized = adq_train.quantize(
        network, [images], bits=dict.fromkeys(names[1:-1], bits), target="int8"
    )
    integers = program_of(integer_network(quantized), images)
    forms = {"litert_float": as_float(integers), "tflite": integers, "tflm": compressed(integers)}
    for form, content in forms.items():
        (folder / form).write_bytes(file_bytes(content, {}))
    return images[:1]


def networks_beside(name: str, bits: int, rounds: int) -> None:
    """Prints milliseconds and bytes of a network's forms."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        image = write_files(name, bits, folder)
        loaded: dict[str, nn.Module] = {
            "onnx_float": FileHere(folder / "onnx_float", "onnxruntime")
        }
        for form in ("litert_float", "tflite"):
            loaded[form] = FileHere(folder / form, "LiteRT")
        if name != "resnet18":
            loaded["tflm"] = FileHere(folder / "tflm", "TensorFlow Lite Micro")
        times: dict[str, list[float]] = {form: [] for form in loaded}
        for number in range(rounds + 3):
            for form, network in loaded.items():
                began = time.perf_counter()
                network(image)
                if number >= 3:
                    times[form].append(1000 * (time.perf_counter() - began))
        print(f"{name}, {bits} bits, one image, {torch.get_num_threads()} threads")
        for form in ("onnx_float", "litert_float", "tflite", "tflm"):
            size = (folder / form).stat().st_size
            spent = f"{statistics.median(times[form]):9.3f}" if form in times else "        -"
            print(f"{form:14}{spent} ms {size / 1000:10.1f} kB")


def rescaling(pairs: int) -> None:
    """Prints how many codes each operation gets wrong between random pairs of steps."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = {
        "XNNPACK": OpResolverType.AUTO,
        "plain": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        "reference": OpResolverType.BUILTIN_REF,
    }
    drawn = np.random.default_rng(0)
    codes = np.arange(-128, 128).astype(np.int8).reshape(1, 256)
    wrong = {(op, kernel): 0 for op in ("QUANTIZE", "MUL", "ADD") for kernel in kernels}
    for _ in range(pairs):
        high = 2 ** int(drawn.integers(2, 9)) - 1
        step = np.float32(drawn.uniform(0.01, 0.1))
        other = np.float32(step * 255 / high * drawn.uniform(0.3, 1.2))
        x = Value("x", (1, 256), "int8", step, -128)
        y = Value("y", (1, 256), "int8", other, 127 - high)
        zero = Value("zero", (1,), "int8", step, data=np.zeros(1))
        one = Value("one", (1,), "int8", np.float32(1 / 127), data=np.full(1, 127))
        nearest = np.minimum(np.rint((codes + 128.0) * step / other), high) + y.zero_point
        for op, inputs in {"QUANTIZE": (x,), "MUL": (x, one), "ADD": (x, zero)}.items():
            program = Program((Operation(op, 1 if op == "QUANTIZE" else 2, inputs, y),), x, y)
            for kernel, resolver in kernels.items():
                run = Interpreter(
                    model_content=file_bytes(program, {}), experimental_op_resolver_type=resolver
                )
                run.allocate_tensors()
                run.set_tensor(run.get_input_details()[0]["index"], codes)
                run.invoke()
                found = run.get_tensor(run.get_output_details()[0]["index"])
                wrong[op, kernel] += int((found != nearest).sum())
    print(f"codes that are not the nearest, of {256 * pairs:,}")
    for (op, kernel), count in wrong.items():
        print(f"{op:10}{kernel:10}{count:7,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*NETWORKS, "rescaling"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "rescaling":
        rescaling(arguments.rounds)
    else:
        networks_beside(arguments.what, arguments.bits, arguments.rounds)


if __name__ == "__main__":
    main()
