"""Triton's kernels give what the plain form gives, and compile for GPUs without spilling.

They run in Triton's interpreter, which is chosen before Triton is imported: this file runs itself
once more in a process of its own, where the tests below are the others.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adq_train.quantization import gpu_kernels, kernels
from adq_train.quantization.functional import midpoints
from adq_train.quantization.steps import GeneralizedSTE, interval_edges, step_gradients

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="runs in the compiler")
CPU = torch.device("cpu")

if INTERPRETED:
    from adq_train.quantization import triton_kernels

    # NumPy has no bfloat16 to multiply; the factors hold bfloat16's values all the same.
    triton_kernels.FACTORS = triton.language.float32


@compiled
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ADQ_TRAIN_KERNELS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout


def rounded_as(got, expected):
    """Whether values of 16 bits agree to the last one: the interpreter cuts where a GPU rounds."""
    if got.dtype == torch.float32:
        return torch.equal(got, expected)
    last = torch.finfo(got.dtype).eps * expected.float().abs() + torch.finfo(got.dtype).tiny
    return bool(((got.float() - expected.float()).abs() <= last).all())


def step(bits, numbers, few=False):
    """Start, widths and levels of a step function; with ``few`` fewer than the bits have."""
    count = 2**bits - 1 - few
    widths = (torch.rand(count, generator=numbers) + 0.2) * 4 / 2**bits
    levels = torch.rand(count + 1, generator=numbers).cumsum(0) * 0.3 - 1
    return torch.tensor(-1.5), widths, levels


cases = {
    "seed": st.integers(0, 2**32),
    "bits": st.sampled_from([2, 3, 4, 5, 8]),
    "size": st.sampled_from([1, 7, 1500]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
}


@interpreted
@settings(deadline=None, max_examples=25)
@given(**cases, few=st.booleans())
def test_staircase_is_equal_bit_for_bit(seed, bits, size, dtype, few):
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=numbers).to(dtype)
    start, widths, levels = step(bits, numbers, few)
    thresholds = midpoints(interval_edges(start, widths))
    x[: len(thresholds)] = thresholds[: len(x)].to(dtype)
    y = triton_kernels.staircase(x, thresholds, levels)
    expected = levels[(x.float()[:, None] > thresholds).sum(1)].to(dtype)
    assert y.dtype == dtype
    assert rounded_as(y, expected)


@interpreted
@pytest.mark.parametrize("count", [3, 7, 15, 16, 31, 255])
def test_staircase_of_odd_values_and_borders(count):
    borders = torch.linspace(-1, 1, count)
    x = torch.cat([borders, torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])])
    values = torch.arange(count + 1.0)
    for row in (borders, torch.zeros(count), borders * math.inf):
        row = row.nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)
        expected = values[torch.bucketize(x, row)]
        assert torch.equal(triton_kernels.staircase(x, row, values), expected)


@interpreted
@settings(deadline=None, max_examples=25)
@given(**cases, few=st.booleans())
@example(seed=2369076, bits=5, size=1, dtype=torch.float32, few=False)  # 2.5e-5 where bits were cut
def test_gradients_are_those_of_the_plain_form(seed, bits, size, dtype, few):
    numbers = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(size, generator=numbers).to(dtype) for _ in range(2))
    parameters = step(bits, numbers, few)
    edges = interval_edges(*parameters[:2])
    grad_x, gradients = triton_kernels.step_gradients(
        x, grad, edges, midpoints(edges), *parameters[1:]
    )
    # In float64, with the edges that the kernel gets: float32 rounds them.
    exact = [t.double() for t in (edges, midpoints(edges), *parameters[1:])]
    expected = step_gradients(x.double(), *exact, grad.double())
    assert grad_x.dtype == dtype
    close = rounded_as if dtype != torch.float32 else torch.allclose
    assert close(grad_x, expected[0].to(dtype))
    row = torch.cat([t.view(-1) for t in expected[1:]]).float()
    # Summands that cancel are rounded for their own size; in histograms, to 16 bits.
    sizes = step_gradients(x.double(), *exact, grad.double().abs())[1:]
    scale = float(torch.cat([t.view(-1) for t in sizes]).abs().max()) + 1e-30
    torch.testing.assert_close(gradients / scale, row / scale, rtol=0, atol=2e-5)


@interpreted
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_of_whole_numbers_are_exact(bits):
    """Sums of small integers, whose order and rounding cannot matter, over several programs."""
    count = 2**bits - 1
    numbers = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 4 * count + 8, (3000,), generator=numbers) / 4
    grad = torch.randint(-3, 4, (3000,), generator=numbers).float()
    parameters = torch.zeros(()), torch.ones(count), torch.arange(count + 1.0)
    edges = interval_edges(*parameters[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "PROGRAMS", 2)  # so that each looks at several blocks
        got = triton_kernels.step_gradients(x, grad, edges, midpoints(edges), *parameters[1:])
    inputs = [t.double().requires_grad_() for t in (x, *parameters)]
    expected = torch.autograd.grad(GeneralizedSTE.apply(*inputs), inputs, grad.double())
    assert torch.equal(got[0], expected[0].float())
    row = torch.cat([t.view(-1) for t in expected[1:]])
    torch.testing.assert_close(got[1], row.float(), rtol=1e-5, atol=0)


@interpreted
@pytest.mark.parametrize("bits", [3, 8])
def test_what_is_beyond_all_edges_spoils_no_sum(bits):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    start, widths, levels = step(bits, torch.Generator().manual_seed(0))
    edges = interval_edges(start, widths)
    grad_x, gradients = triton_kernels.step_gradients(
        x, torch.tensor([1.0, 2, 4, 0]), edges, midpoints(edges), widths, levels
    )
    expected = torch.zeros(2 * len(levels))
    expected[len(levels)], expected[-1] = 2, 5
    assert torch.equal(gradients.abs(), expected)
    assert not grad_x.any()


@interpreted
def test_a_gradient_that_nobody_wants_is_not_computed():
    x = torch.randn(100)
    start, widths, levels = step(3, torch.Generator().manual_seed(0))
    edges = interval_edges(start, widths)
    rest = x, x, edges, midpoints(edges), widths, levels
    whole, without = (triton_kernels.step_gradients(*rest, wanted) for wanted in (True, False))
    assert without[0].numel() == 0
    assert torch.equal(whole[1], without[1])


@interpreted
def test_forward_is_one_launch_and_backward_two(monkeypatch):
    launched = []
    for name, kernel in vars(triton_kernels).copy().items():
        if hasattr(kernel, "run"):
            monkeypatch.setattr(triton_kernels, name, Counted(kernel, name, launched))
    x, levels = torch.randn(10), torch.arange(4.0)
    edges = torch.arange(4.0)
    triton_kernels.staircase(x, midpoints(edges), levels)
    assert launched == ["_staircase"]
    triton_kernels.step_gradients(x, x, edges, midpoints(edges), torch.ones(3), levels)
    assert launched[1:] == ["_few_sums", "_parameter_gradients"]


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_function_takes_the_kernels_in_every_layout(bits, layout, monkeypatch):
    """As on a GPU: x in its dtype and order, gradients in another order and type."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 5)
    x = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": x[:, :, ::2].transpose(1, 3),
    }[layout]
    parameters = step(bits, torch.Generator().manual_seed(0))
    grad = torch.randn(x.shape).bfloat16()

    def results(of_input=True):
        inputs = [x.detach().requires_grad_(of_input), *(p.requires_grad_() for p in parameters)]
        y = GeneralizedSTE.apply(*inputs)
        assert y.stride() == (x if layout != "strided" else x.contiguous()).stride()
        inputs = inputs if of_input else inputs[1:]
        return [y, *torch.autograd.grad(y, inputs, grad.float())]

    monkeypatch.setattr(kernels, "library", lambda: None)
    plain = results()
    monkeypatch.setattr(gpu_kernels, "usable", lambda x: True)
    monkeypatch.setattr(gpu_kernels, "module", lambda x: triton_kernels)
    by_gpu = results()
    assert torch.equal(by_gpu[0], plain[0])
    for got, expected in zip(by_gpu[1:], plain[1:], strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
    for got, expected in zip(results(of_input=False)[1:], by_gpu[2:], strict=True):
        assert torch.equal(got, expected)


class Counted:
    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


@interpreted
def test_kernels_are_tried_before_they_are_used(monkeypatch):
    loaded = gpu_kernels.loaded.__wrapped__
    assert loaded(CPU).functions is triton_kernels
    assert loaded(CPU).description == {"kernels": "Triton", "version": triton.__version__}
    right = triton_kernels.staircase
    monkeypatch.setattr(triton_kernels, "staircase", lambda *x: right(*x) + 1)
    assert "give other values" in loaded(CPU).description["reason"]

    def broken(*_):
        raise RuntimeError("no driver\nat all")

    monkeypatch.setattr(triton_kernels, "staircase", broken)
    assert loaded(CPU).description == {"kernels": "plain PyTorch", "reason": "no driver"}


@compiled
def test_without_triton_it_is_plain_pytorch(monkeypatch, caplog):
    loaded = gpu_kernels.loaded.__wrapped__
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level("INFO"):
        assert loaded(CPU).functions is None
    assert "quantizers run in plain PyTorch on the GPU" in caplog.text
    monkeypatch.setenv("ADQ_TRAIN_KERNELS", "0")
    assert loaded(CPU).description["reason"] == "ADQ_TRAIN_KERNELS=0"


def ptxas():
    found = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    return found if found.exists() else None


VALUES = ("x_of", "y_of", "grad_of", "grad_x_of")
COUNTS = ("size", "blocks", "rows")


def code_of(kernel, constants, capability):
    """PTX of a kernel for tensors of bfloat16."""
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(VALUES, "*bf16")
    types |= dict.fromkeys(COUNTS, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t[0] == "*"
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target, {"num_warps": 4}).asm["ptx"]


@compiled
@pytest.mark.skipif(ptxas() is None, reason="no ptxas in Triton's wheel")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_kernels_keep_all_in_registers(capability, tmp_path, monkeypatch):
    from adq_train.quantization import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    few = {"COUNT": 15, "WIDTH": 16, "WANTED": True, "BLOCK": kernels.FEW_VALUES}
    width, values = kernels.MANY
    many = {"COUNT": 255, "WIDTH": width, "WANTED": True, "BLOCK": values}
    forms = [
        (kernels._staircase, {"COUNT": 15, "DIGITS": 4, "BLOCK": kernels.VALUES}),
        (kernels._staircase, {"COUNT": 255, "DIGITS": 8, "BLOCK": kernels.VALUES}),
        (kernels._few_sums, few),
        (kernels._many_sums, {**many, "FACTOR": kernels.FACTORS}),
        (
            kernels._parameter_gradients,
            {"COUNT": 255, "WIDTH": width, "CHUNK": kernels.SUMMANDS // width},
        ),
    ]
    for kernel, constants in forms:
        file = tmp_path / "kernel.ptx"
        file.write_text(code_of(kernel, constants, capability))
        name = f"sm_{capability}" + "a" * (capability == 90)
        command = [ptxas(), "-v", "--gpu-name", name, file, "-o", tmp_path / "kernel.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spilled = re.findall(r"(\d+) bytes spill", told)
        assert spilled, told
        assert set(spilled) == {"0"}, (kernel.__name__, constants, told)
        assert "atom" not in file.read_text()
