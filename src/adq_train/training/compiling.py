"""torch.compile for a whole model or its quantizers; the names in a state dict stay the same."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adq_train.quantization.base import Quantizer

# Layers share their code, and each shape or bit-width of it is a variant; PyTorch gives up after 8.
VARIANTS = 256


def compiler_problem(device: torch.device) -> str | None:
    """What is missing to compile for a device, or None."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    wanted = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if os.name == "posix" and not any(shutil.which(name) for name in wanted):
        return f"there is no C++ compiler ({', '.join(wanted)}); install g++"
    return None


def compiled(model: nn.Module, what: str) -> Callable[[Tensor], Tensor]:
    """What to call in the place of a model, for TorchInductor to compile at its first call.

    Args:
        model: Float or prepared. Its parameters and the names in its state dict stay as they are;
            with ``quantizers`` its quantizers compile wherever they are called.
        what: ``none``, ``quantizers`` (each by itself) or ``model``.

    Returns:
        The model itself, or with ``model`` a compiled form that shares its parameters.
    """
    if what == "none":
        return model
    settings = torch._dynamo.config
    settings.cache_size_limit = max(VARIANTS, settings.cache_size_limit)
    if what == "model":
        form: Callable[[Tensor], Tensor] = torch.compile(model)
        return form
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.compile()
    return model
