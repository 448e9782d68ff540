"""The CPU's fast path: kernels.c, compiled on first use, where a C compiler is at hand.

Without one, and for other devices and dtypes, steps.py computes the same in plain PyTorch.
``ADQ_TRAIN_KERNELS=0`` turns the fast path off.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq_train.errors import first_line
from adq_train.quantization.kernel_cache import (
    CompilerError,
    build,
    cache_folder,
    digest_in_name,
)

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FUNCTIONS = ("adq_staircase", "adq_step_gradients", "adq_order_statistics")


@dataclass(frozen=True)
class Kernels:
    """A device's fast path, or why there is none.

    Attributes:
        functions: The compiled library, or :mod:`~.triton_kernels`; or None.
        description: ``kernels``: C, Triton or plain PyTorch; with C ``compiler`` and the library's
            ``sha256``, with Triton its ``version``, else the ``reason``.
    """

    functions: Any | None
    description: dict[str, str]


@functools.cache
def loaded() -> Kernels:
    """The kernels of this process, compiled at the first call where no earlier one has."""
    if os.environ.get("ADQ_TRAIN_KERNELS") == "0":
        return no_kernels("ADQ_TRAIN_KERNELS=0")
    try:
        try:
            return _opened(build(SOURCE, cache_folder()))
        except (OSError, RuntimeError) as error:
            # Not ours alone, not writable, or on a file system from which no code may run.
            with tempfile.TemporaryDirectory(prefix="adq-train-") as private:
                kernels = _opened(build(SOURCE, Path(private)))
            log.warning(
                "the faster kernels are compiled for this process alone: their cache cannot be "
                "used (%s); XDG_CACHE_HOME chooses another place", first_line(error),
            )  # fmt: skip
            return kernels
    except (OSError, CompilerError) as error:
        reason = first_line(error)
        log.info("quantizers run in plain PyTorch: the faster kernels cannot be used (%s)", reason)
        return no_kernels(reason)


def in_use() -> dict[str, str]:
    """Which form the quantizers take on the CPU, for a manifest.

    Returns:
        ``{"kernels": "C", "compiler": "gcc 12.2.0", "sha256": …}``, or
        ``{"kernels": "plain PyTorch", "reason": …}``.
    """
    return dict(loaded().description)


def library() -> Any | None:
    """The compiled kernels, or None where they cannot be had."""
    return loaded().functions


def _opened(path: Path) -> Kernels:
    """Loads a library; one that lacks something is thrown away.

    Raises:
        OSError: It cannot be loaded here.
        CompilerError: It is not what kernels.c asks for.
    """
    try:
        functions = ctypes.CDLL(str(path))
        for name in FUNCTIONS:
            getattr(functions, name)
        compiler = ctypes.c_char_p(
            ctypes.addressof(ctypes.c_char.in_dll(functions, "adq_compiler"))
        )
    except (AttributeError, ValueError) as error:
        path.unlink(missing_ok=True)
        raise CompilerError(f"the compiler left something out: {first_line(error)}") from error
    told = (compiler.value or b"").decode(errors="replace")
    return Kernels(functions, {"kernels": "C", "compiler": told, "sha256": digest_in_name(path)})


def no_kernels(reason: str) -> Kernels:
    """Plain PyTorch, and why."""
    return Kernels(None, {"kernels": "plain PyTorch", "reason": reason})


def usable(x: Tensor) -> bool:
    """Whether the kernels take this tensor: plain, float32 or bfloat16, on the CPU, untraced."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and library() is not None
    )


def staircase(x: Tensor, borders: Tensor, values: Tensor) -> Tensor:
    """``values[i]`` for i the number of borders below ``x``; see steps.staircase.

    Args:
        x: Any shape, contiguous.
        borders: (K - 1,) sorted.
        values: (K,).
    """
    y = torch.empty_like(x)
    borders, values = _row(borders), _row(values)
    _library().adq_staircase(
        *_pointers(x, y), ctypes.c_size_t(x.numel()), *_pointers(borders, values),
        len(borders), torch.get_num_threads(), x.dtype == torch.bfloat16,
    )  # fmt: skip
    return y


def step_gradients(
    x: Tensor,
    grad: Tensor,
    edges: Tensor,
    thresholds: Tensor,
    widths: Tensor,
    levels: Tensor,
    of_input: bool = True,
) -> tuple[Tensor, Tensor]:
    """All gradients of :class:`~.steps.GeneralizedSTE`.

    Args:
        x: Any shape, contiguous; float32 or bfloat16.
        grad: Of the output, in the shape of ``x``, contiguous.
        edges: (N + 1,) sorted, N ≤ 255.
        thresholds: (N,), each within its interval.
        widths: (N,) positive.
        levels: (N + 1,).
        of_input: Whether the first gradient is wanted.

    Returns:
        That of ``x``, in its shape and dtype, or (0,); those of start (1), widths (N) and levels
        (N + 1) in one row (2 N + 2,), float32.
    """
    assert len(widths) < 256, "kernels.c has room for no more"
    grad = grad.to(x.dtype)
    grad_x = torch.empty_like(x) if of_input else x.new_empty(0)
    tables = [_row(t) for t in (edges, thresholds, widths, levels)]
    gradients = x.new_empty(2 * len(levels), dtype=torch.float32)
    failed = _library().adq_step_gradients(
        *_pointers(x, grad, grad_x), ctypes.c_size_t(x.numel()), *_pointers(*tables, gradients),
        len(widths), torch.get_num_threads(), x.dtype == torch.bfloat16,
    )  # fmt: skip
    if failed:
        raise MemoryError
    return grad_x, gradients


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
    found = values.new_empty(len(ranks))
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
    # Most are what is asked for already, and each operation takes as long as a kernel's call.
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.detach().float().contiguous()
