"""A GPU for tests where there is none: tensors that say ``cuda:0`` and compute on the CPU.

Within :func:`gpu` every operation on such a tensor is looked at as it comes to PyTorch's
dispatcher. What would make the CPU wait for a GPU is counted, and so is what would launch a kernel
there, once for an operation though some launch several; a CPU tensor among them, and in
deterministic mode an operation that has no such form on a GPU, is an error.
"""

import contextlib
import sys
from collections import Counter
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from adq_train.quantization import gpu_kernels, steps

# Operations whose result or its size the CPU must know; bincount reads the largest index.
READS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip

# Operations that give memory, or look at some in another way, besides those that say so.
NO_LAUNCH = {
    "_reshape_alias", "_unsafe_view", "_local_scalar_dense", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "set_", "resize_", "lift_fresh",
}  # fmt: skip

# Those that torch.use_deterministic_algorithms refuses on a GPU, by its documentation.
NOT_DETERMINISTIC = {
    "histc", "put", "put_", "median", "nanmedian", "kthvalue", "nll_loss2d_forward",
    "_ctc_loss_backward", "avg_pool3d_backward", "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward", "max_unpool2d",
    "max_unpool3d", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward",
    "max_pool3d_with_indices_backward", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward",
    "reflection_pad3d_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward",
}  # fmt: skip


class PretendTensor(Tensor):
    """Around a CPU tensor; to PyTorch's C++ side it is a meta tensor, which is neither."""

    @staticmethod
    def __new__(cls, inner):
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="meta",
        )  # fmt: skip
        made.inner = inner
        return made

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self, **options):
        return f"PretendTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Gpu.current.run(func, args, kwargs or {})


def is_gpu(device):
    return device is not None and torch.device(device).type in ("cuda", "meta")


def wrapped(x):
    return PretendTensor(x) if isinstance(x, Tensor) and not isinstance(x, PretendTensor) else x


def on_cpu(x):
    """What a test compares: the tensor's values, without counting."""
    return x.detach().inner if isinstance(x, PretendTensor) else x


def place():
    """The line of adq_train that asks for this operation."""
    frame = sys._getframe()
    while frame:
        name = frame.f_code.co_filename
        if "/adq_train/" in name:
            return f"{name.split('/adq_train/')[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


class Gpu(TorchDispatchMode):
    """Counts waits and launches by operation and place."""

    current = None

    def __init__(self):
        super().__init__()
        self.waits, self.launches = Counter(), Counter()
        self.events = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, PretendTensor)]
        if given or is_gpu(kwargs.get("device")):
            return self.run(func, args, kwargs)
        return func(*args, **kwargs)

    def wait(self, what):
        self.waits[what, place()] += 1

    def launch(self, what):
        self.launches[what, place()] += 1

    def run(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        here = [x for x in tensors if isinstance(x, PretendTensor)]
        others = [x for x in tensors if not isinstance(x, PretendTensor)]
        device = kwargs.get("device")
        to_gpu = is_gpu(device) if device is not None else bool(here)

        if name in ("_to_copy", "copy_"):
            across = bool(others) if name == "copy_" else to_gpu != bool(here)
            if across and not kwargs.get("non_blocking"):
                self.wait(name)
        else:
            index = [x for x in tree_flatten(args[1:2])[0] if isinstance(x, Tensor)]
            if name.startswith(("index", "_index_put")) and any(
                x.dtype in (torch.bool, torch.uint8) for x in index
            ):
                self.wait(f"{name} by a mask")
            strange = [x for x in others if x.dim()]
            assert not strange or not here, f"{func}: a CPU tensor among a GPU's, at {place()}"
            if name in READS:
                self.wait(name)
            if torch.are_deterministic_algorithms_enabled():
                weighted = name == "bincount" and len(args) > 1 and args[1] is not None
                assert not weighted, f"{func} with weights is not deterministic, at {place()}"
                assert name not in NOT_DETERMINISTIC, f"{func} is not deterministic, at {place()}"

        same = name == "_to_copy" and here and kwargs.get("dtype") in (None, args[0].dtype)
        if to_gpu and not func.is_view and name not in NO_LAUNCH and not same:
            self.launch(name)

        def inner(x):
            return x.inner if isinstance(x, PretendTensor) else x

        options = {k: "cpu" if k == "device" and v is not None else v for k, v in kwargs.items()}
        result = func(*tree_map(inner, args), **tree_map(inner, options))
        if name.endswith("_") and not name.endswith("__") and isinstance(result, Tensor):
            return args[0]  # in place
        if "out" in kwargs:
            return kwargs["out"]
        return tree_map(wrapped, result) if to_gpu else result


class Kernels:
    """Triton's kernels: what they launch is counted, and the plain form computes what they give."""

    def __init__(self, found):
        self.found = found

    def staircase(self, x, borders, values):
        self.found.launch("staircase")
        return PretendTensor(steps.staircase(x.inner, on_cpu(borders), on_cpu(values)))

    def step_gradients(self, x, grad, *tables):
        *tables, of_input = tables
        for name in ("sums", "gradients of parameters"):
            self.found.launch(name)
        tables = [on_cpu(t) for t in tables]
        grad_x, *others = steps.step_gradients(x.inner, *tables, grad.inner, of_input)
        row = torch.cat([y.view(-1) for y in others])
        return PretendTensor(grad_x if of_input else grad_x[:0]), PretendTensor(row)


@contextlib.contextmanager
def gpu(triton=False):
    """Gives the :class:`Gpu` that counts within the with block, with Triton or without."""
    found = Gpu()
    kernels, usable = Kernels(found), gpu_kernels.usable

    class Event:
        def synchronize(self):
            found.events += 1

    class Stream:
        def __init__(self, device):
            assert torch.device(device) == torch.device("cuda", 0)

        def record_event(self):
            return Event()

    with (
        mock.patch.object(
            gpu_kernels, "usable", lambda x: isinstance(x, PretendTensor) if triton else usable(x)
        ),
        mock.patch.object(gpu_kernels, "module", return_value=kernels),
        # Asks for CUDA tensors of no other type, which these would be.
        mock.patch.object(clip_grad, "_has_foreach_support", return_value=True),
        mock.patch.object(torch.cuda, "_lazy_init"),
        mock.patch.object(torch.cuda, "current_stream", Stream),
        mock.patch.object(Gpu, "current", found),
        found,
    ):
        yield found


def moved(x):
    """A tensor, or a module with all that it holds, on the GPU; a module is changed in place."""
    if isinstance(x, Tensor):
        return PretendTensor(x.detach().clone())
    for module in x.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
    return x
