"""Compiled training gives what eager training gives, under the same names."""

import copy
import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from training_helpers import IMAGES, network, take, trainer_of

from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.base import Quantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.steps import GeneralizedSTE
from adq_train.training.compiling import compiled, compiler_problem

needs_compiler = pytest.mark.skipif(
    compiler_problem(torch.device("cpu")) is not None, reason="no C++ compiler"
)


def tiny():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    weights, inputs = AdqWeightQuantizer(2, decay=0.5), N2uqActivationQuantizer(2)
    weights.calibrate(model[1].weight)
    inputs.calibrate(IMAGES)
    model[1] = quantized(model[1], weights, inputs)
    return model


def agree(eager, other, what):
    trainers = [trainer_of(eager), trainer_of(other, compile=what)]
    losses = [take(trainer, *[IMAGES] * 3) for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert list(eager.state_dict()) == list(other.state_dict())
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    copy.deepcopy(eager).load_state_dict(other.state_dict())
    assert trainers[1].evaluated is other


@needs_compiler
def test_a_compiled_model_is_the_eager_one():
    torch.compiler.reset()
    agree(tiny(), tiny(), "model")


@pytest.mark.parametrize("what", ["quantizers", "model"])
def test_no_graph_breaks(what, monkeypatch):
    """Without Inductor, which takes its time: what Dynamo and autograd make of the network."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    agree(network(), network(), what)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == {"quantizers": 4, "model": 1}[what]
    assert not counters["graph_break"]


def test_one_graph_with_first_and_last_layers_of_8_bits(monkeypatch):
    """As on a GPU: in bf16, where the two leave autocast. Autograd's part is traced too."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    def layers():
        torch.manual_seed(0)
        made = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(16, 4)]
        for index, bits in enumerate((8, 2, 8)):
            weights, inputs = AdqWeightQuantizer(bits), N2uqActivationQuantizer(bits)
            weights.calibrate(made[index].weight)
            inputs.calibrate(torch.randn(500))
            made[index] = quantized(made[index], weights, inputs)
        norms = [nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)]
        return nn.Sequential(made[0], norms[0], made[1], norms[1], nn.Flatten(), made[2])

    eager, other = layers(), layers()
    trainers = [
        trainer_of(model, compile=what, precision="bf16", channels_last=True)
        for model, what in ((eager, "none"), (other, "model"))
    ]
    losses = [take(trainer, *[IMAGES] * 2) for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert counters["aot_autograd"]["total"] == counters["aot_autograd"]["ok"] == 1


@pytest.mark.parametrize("bits", [2, 8])
def test_for_a_gpu_the_compiler_sees_the_forward_pass_and_one_operator_behind_it(bits):
    """Traced with tensors that say they lie on a GPU, and hold nothing."""
    torch.compiler.reset()
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4, device="cuda", dtype=torch.bfloat16)
        shapes = (), (2**bits - 1,), (2**bits,)
        inputs = [x, *(torch.empty(shape, device="cuda") for shape in shapes)]
        inputs = [t.requires_grad_() for t in inputs]
        traced, _ = torch._dynamo.export(lambda *x: GeneralizedSTE.apply(*x))(*inputs)
    forward, backward = (
        {str(node.target) for node in traced.get_submodule(name).graph.nodes}
        for name in ("fwd_body_0", "bwd_body_0")
    )
    assert any("bucketize" in name for name in forward)
    assert not any("adq_train" in name for name in forward)
    assert "adq_train.step_gradients.default" in backward


def test_on_a_cpu_a_channels_last_input_comes_to_the_kernels_as_it_lies():
    """Turned around before them, a compiler chose orders of memory that took 3 times as long."""
    torch.compiler.reset()
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in (x, torch.zeros(()), torch.ones(3), torch.arange(4.0))]
    traced, _ = torch._dynamo.export(lambda *x: GeneralizedSTE.apply(*x))(*inputs)
    for body, kernel in (("fwd_body_0", "staircase"), ("bwd_body_0", "step_gradients")):
        called = {str(node.target) for node in traced.get_submodule(body).graph.nodes}
        assert f"adq_train.{kernel}.default" in called
        assert not any("permute" in name for name in called)


def test_none_is_the_model():
    model = network()
    assert compiled(model, "none") is model


def test_only_quantizers_compile():
    model = network()
    assert compiled(model, "quantizers") is model
    for module in model.modules():
        assert (module._compiled_call_impl is not None) is isinstance(module, Quantizer)


def test_a_machine_without_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "there is no C++ compiler" in compiler_problem(torch.device("cpu"))
    monkeypatch.setenv("CXX", "my-cc")
    assert "(my-cc)" in compiler_problem(torch.device("cpu"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert compiler_problem(torch.device("cpu")) is None


def test_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton is not installed" in compiler_problem(torch.device("cuda"))
