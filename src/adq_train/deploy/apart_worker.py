"""Runs a file of anybody in a process of its own, whose memory has a limit.

A runtime computes whatever a graph says, some already when they load it; so neither the size of an
answer nor a crash can be known beforehand. Messages are a line of JSON, then raw float32 values.
Torch is not imported here.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from adq_train.deploy.runtimes import RUNTIMES
from adq_train.errors import first_line

# Beyond what the program itself takes: for the graph, and for each byte of images and of the file.
SPARE_BYTES = 2 << 30
PER_IMAGE_BYTE = 64
PER_FILE_BYTE = 8
# What is asked back: class scores, no images.
LARGEST_CLASSES = 1 << 20


def main() -> None:
    """Answers requests on standard input until it ends."""
    path, threads, runtime = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        import numpy as np

        kind = RUNTIMES[runtime]
        for package in kind.packages:
            importlib.import_module(package)
        limit = _Limit(path)
        limit.allow(0)
        graph = kind(path, threads)
        _answer(answers, inputs=graph.inputs, outputs=graph.outputs, metadata=graph.metadata)
        while line := sys.stdin.buffer.readline():
            shape = json.loads(line)["shape"]
            raw = sys.stdin.buffer.read(4 * math.prod(shape))
            limit.allow(len(raw))
            images = np.frombuffer(raw, np.float32).reshape(shape)
            start = time.perf_counter()
            logits = graph.run(images)
            seconds = time.perf_counter() - start
            if logits.dtype != np.float32 or logits.ndim != 2 or len(logits) != shape[0]:
                raise ValueError(f"it answers with {logits.dtype} of shape {logits.shape}")
            if logits.shape[1] > LARGEST_CLASSES:
                raise ValueError(f"it answers with {logits.shape[1]:,} values for an image")
            _answer(answers, logits.tobytes(), shape=logits.shape, seconds=seconds)
    except MemoryError:
        _answer(answers, error="it takes more memory than it may; try a smaller batch_size")
    except Exception as error:  # a graph may fail in any way
        _answer(answers, error=first_line(error))


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
