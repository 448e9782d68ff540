"""The CPU's fast path: kernels.c, compiled on first use, where a C compiler is at hand.

Without one, and for other devices and dtypes, functional.py computes the same in plain PyTorch.
``ADQ_TRAIN_KERNELS=0`` turns the fast path off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/adq_train``, or below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adq_train"


def build(source: Path, folder: Path) -> Path:
    """Compiles a C file to a shared library, unless this very file has been compiled before.

    Args:
        source: The C file.
        folder: Where libraries are kept, named by what they depend on.

    Raises:
        OSError: No compiler, or no place to write.
        subprocess.CalledProcessError: The compiler refuses the file.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc) on the PATH")
    # Built for this very processor, so a cache that machines share keeps one for each kind.
    machine = f"{platform.machine()} {_processor()}"
    identity = "\n".join([source.read_text(encoding="utf-8"), compiler, *FLAGS, machine])
    library = folder / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, library.name)
            command = [compiler, *FLAGS, str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(library)
    return library


def _processor() -> str:
    """The processor's model and features, as Linux tells them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Feat"))}))


@functools.cache
def library() -> Any | None:
    """The compiled kernels, or None where they cannot be had."""
    if os.environ.get("ADQ_TRAIN_KERNELS") == "0":
        return None
    try:
        return ctypes.CDLL(str(build(SOURCE, cache_folder())))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[0]
        log.info("quantizers run in plain PyTorch: the faster kernels were not built (%s)", reason)
        return None


def usable(x: Tensor) -> bool:
    """Whether the kernels take this tensor: plain float32 on the CPU, and nobody traces."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and library() is not None
    )


def staircase(x: Tensor, borders: Tensor, values: Tensor) -> Tensor:
    """``values[i]`` for i the number of borders below ``x``; see functional.staircase.

    Args:
        x: Any shape, contiguous.
        borders: (K - 1,) sorted.
        values: (K,).
    """
    y = torch.empty_like(x)
    borders, values = _row(borders), _row(values)
    _library().adq_staircase(
        *_pointers(x, y), ctypes.c_size_t(x.numel()), *_pointers(borders, values),
        len(borders), torch.get_num_threads(),
    )  # fmt: skip
    return y


def interval_sums(
    x: Tensor, grad: Tensor, edges: Tensor, thresholds: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient and sums for the generalised straight-through; see functional.interval_sums.

    Args:
        x: Any shape, contiguous.
        grad: Of the output, in the shape of ``x``, contiguous.
        edges: (N + 1,) sorted.
        thresholds: (N,), each within its interval.
        slopes: (N + 2,).

    Returns:
        The gradient of ``x``, and sums (2 N + 4,).
    """
    grad_x = torch.empty_like(x)
    edges, thresholds, slopes = _row(edges), _row(thresholds), _row(slopes)
    sums = torch.empty(2 * len(edges) + 2, dtype=torch.float64)
    failed = _library().adq_interval_sums(
        *_pointers(x, grad, grad_x), ctypes.c_size_t(x.numel()),
        *_pointers(edges, thresholds, slopes, sums), len(thresholds), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError
    return grad_x, sums


def order_statistics(values: Tensor, ranks: Tensor) -> Tensor:
    """The values of these ranks, from 0 for the smallest, in time proportional to their number.

    Args:
        values: (n,), n ≥ 1.
        ranks: (m,) int64 in ``0 … n - 1``.

    Returns:
        (m,) values.
    """
    values = values.contiguous()
    ascending, places = ranks.sort()
    found = torch.empty(len(ranks))
    failed = _library().adq_order_statistics(
        *_pointers(values), ctypes.c_size_t(len(values)),
        *_pointers(ascending), len(ranks), *_pointers(found),
    )  # fmt: skip
    if failed:
        raise MemoryError
    return torch.empty_like(found).scatter_(0, places, found)


def _library() -> Any:
    found = library()
    assert found is not None, "ask usable() first"
    return found


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


def _row(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()
