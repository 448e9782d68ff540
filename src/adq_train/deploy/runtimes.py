"""Other programs that run networks, each behind the same four attributes and one method.

Torch is not imported here: a process of its own (apart_worker.py) is to be small.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar, Protocol

from adq_train.deploy.onnx_checks import check_places
from adq_train.deploy.qonnx_runtime import QonnxGraph

# What activations may take where a runtime wants to know beforehand.
ARENA_BYTES = 64 << 20


class Graph(Protocol):
    """A file, loaded.

    Attributes:
        packages: What it needs, as it is imported.
        inputs: Shape of the images, channels first; no numbers where it is free.
        outputs: Shape of the logits.
        metadata: Texts by name.
    """

    packages: ClassVar[tuple[str, ...]]
    inputs: list[Any]
    outputs: list[Any]
    metadata: dict[str, str]

    def __init__(self, path: Path, threads: int) -> None: ...

    def run(self, images: Any) -> Any:
        """Maps images (N, C, H, W) to logits (N, num_classes), both arrays of float32."""
        ...


class OnnxGraph:
    """An ONNX file in onnxruntime."""

    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    def __init__(self, path: Path, threads: int) -> None:
        import onnx

        onnxruntime: Any = importlib.import_module("onnxruntime")
        proto = onnx.load(str(path), load_external_data=False)
        check_places(proto, path)
        del proto
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        (image,), first = self.session.get_inputs(), self.session.get_outputs()[0]
        self.names = image.name, first.name
        self.inputs, self.outputs = image.shape, first.shape
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def run(self, images: Any) -> Any:
        """Maps images to logits."""
        return self.session.run([self.names[1]], {self.names[0]: images})[0]


class LitertGraph:
    """A .tflite file in LiteRT. Its images have their channels last."""

    packages: ClassVar[tuple[str, ...]] = (
        "ai_edge_litert.interpreter",
        "ai_edge_litert.schema_py_generated",
    )

    def __init__(self, path: Path, threads: int) -> None:
        interpreter: Any = importlib.import_module(self.packages[0])
        content = path.read_bytes()
        self.metadata = texts_of(content)
        self.interpreter = interpreter.Interpreter(model_content=content, num_threads=threads)
        (image,), first = (
            self.interpreter.get_input_details(),
            self.interpreter.get_output_details()[0],
        )
        self.numbers, self.shape = (image["index"], first["index"]), ()
        shapes = [[None if n < 0 else int(n) for n in x["shape_signature"]] for x in (image, first)]
        self.outputs = shapes[1]
        self.inputs = [*shapes[0][:1], *shapes[0][-1:], *shapes[0][1:-1]]

    def run(self, images: Any) -> Any:
        """Maps images to logits."""
        images = images.transpose(0, *range(2, images.ndim), 1)
        if images.shape != self.shape:
            self.interpreter.resize_tensor_input(self.numbers[0], images.shape, strict=True)
            self.interpreter.allocate_tensors()
            self.shape = images.shape
        self.interpreter.set_tensor(self.numbers[0], images)
        self.interpreter.invoke()
        return self.interpreter.get_tensor(self.numbers[1])


class TflmGraph:
    """A .tflite file in TensorFlow Lite Micro's portable kernels, an image at a time."""

    packages: ClassVar[tuple[str, ...]] = (
        "tflite_micro",
        "ai_edge_litert.schema_py_generated",
    )

    def __init__(self, path: Path, threads: int) -> None:
        runtime = importlib.import_module(self.packages[0]).runtime
        content = path.read_bytes()
        self.metadata = texts_of(content)
        self.interpreter = runtime.Interpreter.from_bytes(content, arena_size=ARENA_BYTES)
        _, *image = map(int, self.interpreter.get_input_details(0)["shape"])
        self.inputs = [None, *image[-1:], *image[:-1]]
        self.outputs = [None, *map(int, self.interpreter.get_output_details(0)["shape"][1:])]

    def run(self, images: Any) -> Any:
        """Maps images to logits."""
        import numpy as np

        logits = []
        for image in images:
            self.interpreter.set_input(image.transpose(*range(1, image.ndim), 0)[None].copy(), 0)
            self.interpreter.invoke()
            logits.append(self.interpreter.get_output(0))
        return np.concatenate(logits)


def texts_of(content: bytes) -> dict[str, str]:
    """The metadata of a .tflite file."""
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.Model.GetRootAs(content)
    entries = [model.Metadata(i) for i in range(model.MetadataLength())]
    found = {x.Name(): model.Buffers(x.Buffer()).DataAsNumpy() for x in entries}
    # An empty buffer reads as 0.
    return {
        name.decode(): bytes(text).decode(errors="replace")
        for name, text in found.items()
        if not isinstance(text, int)
    }


RUNTIMES: dict[str, type[Graph]] = {
    "onnxruntime": OnnxGraph,
    "qonnx": QonnxGraph,
    "LiteRT": LitertGraph,
    "TensorFlow Lite Micro": TflmGraph,
}
