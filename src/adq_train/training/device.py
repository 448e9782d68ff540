"""What a process chooses before it computes: its GPU, and how that rounds."""

from __future__ import annotations

import os

import torch


def use(device: torch.device, *, deterministic: bool = False, precision: str = "float32") -> None:
    """Makes a device this process's own and settles its arithmetic.

    Args:
        device: With an index it becomes the current one too, where events, seeds and libraries
            go that are not told a device.
        deterministic: Whether a GPU computes the same bits every time; a CPU does in any case.
        precision: With ``tf32`` a GPU's convolutions and matrix products of float32 round their
            factors to 10 bits. Without it they do not, in convolutions either, where PyTorch
            would by default.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if deterministic:  # read by cuBLAS when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
