"""Whether the GPU's fast path can be used: triton_kernels.py, where Triton is installed and works.

Without it steps.py computes the same in plain PyTorch. ``ADQ_TRAIN_KERNELS=0`` turns it off,
as it does the CPU's.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType

import torch
from torch import Tensor, nn

from adq_train.errors import first_line
from adq_train.quantization.kernels import Kernels, no_kernels

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def loaded(device: torch.device) -> Kernels:
    """The kernels for a GPU, tried once: the first call compiles some and waits for them."""
    if os.environ.get("ADQ_TRAIN_KERNELS") == "0":
        return _none("ADQ_TRAIN_KERNELS=0")
    try:
        import triton

        from adq_train.quantization import triton_kernels

        for bits in (2, 8):
            _try(triton_kernels, bits, device)
    except ImportError as error:
        return _none(f"Triton cannot be imported: {error}")
    # Whatever a compiler, a driver or an older Triton may say: a run goes on without.
    except Exception as error:
        return _none(first_line(error))
    return Kernels(triton_kernels, {"kernels": "Triton", "version": triton.__version__})


def in_use(device: torch.device) -> dict[str, str]:
    """Which form the quantizers take on a GPU, for a manifest.

    Returns:
        ``{"kernels": "Triton", "version": …}``, or
        ``{"kernels": "plain PyTorch", "reason": …}``.
    """
    return dict(loaded(device).description)


def usable(x: Tensor) -> bool:
    """Whether the kernels take this tensor: plain, on a GPU, of 32 or 16 bits, untraced."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.dtype in DTYPES
        and x.numel() > 0
        and loaded(x.device).functions is not None
    )


def module(x: Tensor) -> ModuleType:
    """The kernels for a tensor that :func:`usable` takes."""
    found: ModuleType | None = loaded(x.device).functions
    assert found is not None, "ask usable() first"
    return found


def _try(module: ModuleType, bits: int, device: torch.device) -> None:
    """Compares the kernels of a bit-width with what they shall give.

    Raises:
        RuntimeError: They give something else.
    """
    count = 2**bits - 1
    edges = torch.arange(count + 1.0, device=device)
    thresholds, widths, levels = edges[1:] - 0.5, torch.ones(count, device=device), 2 * edges
    x = edges + 0.75  # one in each interval, above its threshold, and one beyond all
    y = module.staircase(x, thresholds, levels)
    grad_x, gradients = module.step_gradients(
        x, torch.ones_like(x), edges, thresholds, widths, levels
    )
    # Each interval pulls its start by 2, and the widths of all before it; each has its own 0.75.
    k = edges[:-1]
    of_widths = -1.5 - 2 * (count - 1 - k)
    of_levels = torch.where(edges == 0, 0.0, torch.where(edges == count, 2.0, 1.0))
    expected = torch.cat([(-2.0 * widths.sum()).view(1), of_widths, of_levels])
    slopes = torch.where(edges == count, 0.0, 2.0)
    # A level of an interval is reached at its threshold.
    values = 2 * (edges + 1).clamp_max(count)
    if not (
        torch.equal(y, values)
        and torch.equal(grad_x, slopes)
        and torch.allclose(gradients, expected, rtol=1e-3)
    ):
        raise RuntimeError(f"Triton's kernels for {bits} bits give other values than they should")


def _none(reason: str) -> Kernels:
    log.info(
        "quantizers run in plain PyTorch on the GPU: the faster kernels cannot be used (%s)", reason
    )
    return no_kernels(reason)
