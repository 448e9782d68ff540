"""Runs an ONNX file of anybody in a process of its own, whose memory has a limit.

onnxruntime computes whatever a graph says, already when it loads it; so neither the size of an
answer nor a crash can be known beforehand. Messages are a line of JSON, then raw float32 values.
Torch is not imported here.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# Beyond what the program itself takes: for the graph, and for each byte of images and of the file.
SPARE_BYTES = 2 << 30
PER_IMAGE_BYTE = 64
PER_FILE_BYTE = 8
# What is asked back: class scores, no images.
LARGEST_CLASSES = 1 << 20


def main() -> None:
    """Answers requests on standard input until it ends."""
    path, threads = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        import numpy as np
        import onnx

        onnxruntime: Any = importlib.import_module("onnxruntime")

        limit = _Limit(path)
        limit.allow(0)
        proto = onnx.load(str(path), load_external_data=False)
        check_places(proto, path)
        del proto
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        (image,), first = session.get_inputs(), session.get_outputs()[0]
        metadata = session.get_modelmeta().custom_metadata_map
        _answer(answers, inputs=image.shape, outputs=first.shape, metadata=metadata)
        while line := sys.stdin.buffer.readline():
            shape = json.loads(line)["shape"]
            raw = sys.stdin.buffer.read(4 * math.prod(shape))
            limit.allow(len(raw))
            images = np.frombuffer(raw, np.float32).reshape(shape)
            logits = session.run([first.name], {image.name: images})[0]
            if logits.dtype != np.float32 or logits.ndim != 2 or len(logits) != shape[0]:
                raise ValueError(f"it answers with {logits.dtype} of shape {logits.shape}")
            if logits.shape[1] > LARGEST_CLASSES:
                raise ValueError(f"it answers with {logits.shape[1]:,} values for an image")
            _answer(answers, logits.tobytes(), shape=logits.shape)
    except MemoryError:
        _answer(answers, error="it takes more memory than it may; try a smaller batch_size")
    except Exception as error:  # a graph may fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _answer(answers, error=reason)


def _answer(answers: BinaryIO, raw: bytes = b"", **content: Any) -> None:
    answers.write(json.dumps(content).encode() + b"\n" + raw)
    answers.flush()


class _Limit:
    """The memory that this process may take, where the system knows such limits."""

    def __init__(self, path: Path) -> None:
        try:
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        except OSError:
            pages = 0
        own = pages * resource.getpagesize() if pages else 8 << 30
        self.base = own + SPARE_BYTES + PER_FILE_BYTE * path.stat().st_size

    def allow(self, image_bytes: int) -> None:
        """Sets the limit for a batch."""
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = self.base + PER_IMAGE_BYTE * image_bytes
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_places(proto: Any, path: Path) -> None:
    """Refuses a model whose tensors are kept anywhere but in files beside it.

    Raises:
        ValueError: Names the place.
    """
    for tensor in _tensors(proto):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        places = {entry.key: entry.value for entry in tensor.external_data}
        name = places.get("location", "")
        beside = path.parent / name
        plain = name not in ("", ".", "..") and Path(name).name == name
        if not plain or not beside.exists() or not stat.S_ISREG(os.lstat(beside).st_mode):
            raise ValueError(f"it keeps values in {name!r}, which is no plain file beside it")
        end = int(places.get("offset", 0)) + int(places.get("length", 0))
        if end > beside.stat().st_size:
            raise ValueError(f"it keeps values beyond the end of {name!r}")


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor within a protobuf message, wherever it is."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            yield from _tensors(part)
