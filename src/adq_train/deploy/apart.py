"""A file, run by its runtime: one of ours here, one of anybody in another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.data.base import InputFormat
from adq_train.deploy.formats import METADATA_KEY
from adq_train.deploy.runtimes import RUNTIMES
from adq_train.errors import UserError, first_line

LONGEST_LINE = 1 << 24
# A graph may compute for ever; no file of a network takes so long for a batch.
MOST_SECONDS = 600.0
# Not with -m: that would import from the working folder, which may be anybody's.
START = "import sys; sys.path[:] = filter(None, sys.path); " + (
    "from adq_train.deploy.apart_worker import main; main()"
)


class FileHere(nn.Module):
    """A file of ours, in this process; maps images (N, C, H, W) to logits (N, num_classes).

    Args:
        path: The file.
        runtime: A name of :data:`~adq_train.deploy.runtimes.RUNTIMES`.

    Raises:
        UserError: The runtime cannot read it.
    """

    def __init__(self, path: Path, runtime: str) -> None:
        super().__init__()
        try:
            self.graph = RUNTIMES[runtime](path, torch.get_num_threads())
        except UserError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common class
            raise UserError(f"{path}: {runtime} cannot read it ({first_line(error)})") from error

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, C, H, W) to logits (N, num_classes)."""
        values = images.float() if images.is_floating_point() else images
        return torch.from_numpy(self.graph.run(values.contiguous().numpy()))


class FileApart(nn.Module):
    """A file of anybody, in a process of its own (apart_worker.py); maps images to logits as here.

    Args:
        path: The file.
        runtime: A name of :data:`~adq_train.deploy.runtimes.RUNTIMES`.

    Attributes:
        seconds: What its runtime took for the last batch.

    Raises:
        UserError: The file cannot be read, or its graph has other shapes than its metadata say.
    """

    def __init__(self, path: Path, runtime: str) -> None:
        super().__init__()
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        self.path, self.runtime, self.seconds = path, runtime, 0.0
        self.process = subprocess.Popen(
            [
                sys.executable, "-c", START, str(path.absolute()),
                str(torch.get_num_threads()), runtime,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MALLOC_ARENA_MAX": "2"},
        )  # fmt: skip
        # It may compute for ever, and does not hear signals then.
        weakref.finalize(self, _end, self.process)
        with self._in_time():
            opened = self._answer()
        self.facts = self._facts(opened["metadata"])
        self.expects = self._expects(opened["inputs"], opened["outputs"])

    def _facts(self, metadata: dict[str, str]) -> dict[str, Any]:
        """What adq-export wrote about the model; empty for another program's file."""
        try:
            facts = json.loads(metadata.get(METADATA_KEY, "{}"))
        except (ValueError, RecursionError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def _expects(self, images: list[Any], logits: list[Any]) -> InputFormat | None:
        """What the file says it expects, checked against the graph; None where it does not."""
        fixed = [*images[1:], *logits[1:]]
        said = None
        if "input" in self.facts:
            try:
                said = InputFormat.from_dict(self.facts["input"])
            except UserError as error:
                raise UserError(f"{self.path}: {error}") from error
            told = [*said.image_shape, said.num_classes]
            fits = len(images) == 4 and len(logits) == 2
            if not fits or any(type(x) is int and x != y for x, y in zip(fixed, told, strict=True)):
                raise UserError(
                    f"{self.path}: its graph maps {images} to {logits}, its metadata say images of "
                    f"{said.image_shape} in {said.num_classes} classes; export it again"
                )
        elif len(fixed) == 4 and all(type(x) is int and x > 0 for x in fixed):
            said = InputFormat(fixed[3], (fixed[0], fixed[1], fixed[2]))
        return said

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Ends the other process where an exchange takes too long.

        Raises:
            UserError: It did.
        """
        timer = Timer(MOST_SECONDS, self.process.kill)
        timer.start()
        try:
            yield
        except UserError as error:
            if not timer.is_alive():
                raise UserError(
                    f"{self.path}: {self.runtime} has not answered within {MOST_SECONDS:g} s and "
                    "was ended; try a smaller batch_size"
                ) from error
            raise
        finally:
            timer.cancel()

    def _answer(self) -> dict[str, Any]:
        """The next line of the other process.

        Raises:
            UserError: It found an error, or it ended.
        """
        assert self.process.stdout is not None
        try:
            content: Any = json.loads(self.process.stdout.readline(LONGEST_LINE))
        except ValueError as error:
            code = self.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise UserError(
                f"{self.path}: {self.runtime} ended without an answer ({how})"
            ) from error
        if "error" in content:
            raise UserError(f"{self.path}: {self.runtime} cannot run it ({content['error']})")
        return dict(content)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, C, H, W) to logits (N, num_classes)."""
        with self._in_time():
            return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"shape": list(images.shape)}).encode() + b"\n")
            self.process.stdin.write(images.float().contiguous().numpy().tobytes())
            self.process.stdin.flush()
        except OSError:  # it has ended; its answer says why
            self._answer()
        answer = self._answer()
        self.seconds, (count, width) = float(answer["seconds"]), answer["shape"]
        wanted = self.expects.num_classes if self.expects else width
        if (count, width) != (len(images), wanted):
            raise UserError(
                f"{self.path}: it gives {width} logits for an image, and says that there are "
                f"{wanted} classes"
            )
        raw = self.process.stdout.read(4 * count * width)
        return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(count, width)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
