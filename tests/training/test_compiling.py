"""Compiled training gives what eager training gives, under the same names."""

import copy
import shutil

import pytest
import torch
from training_helpers import IMAGES, TARGETS, network, sgd

from adq_train.quantization.base import Quantizer
from adq_train.training.compiling import compiled, compiler_problem
from adq_train.training.step import TrainingStep

needs_compiler = pytest.mark.skipif(
    compiler_problem(torch.device("cpu")) is not None, reason="no C++ compiler"
)


@needs_compiler
@pytest.mark.parametrize("what", ["quantizers", "model"])
def test_compiled_is_eager(what):
    torch.compiler.reset()
    eager, other = network(), network()
    steps = [TrainingStep(eager, sgd(eager)), TrainingStep(other, sgd(other), compile=what)]
    calls = []
    if what == "model":  # the compiled form is what runs
        other.register_forward_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    for n in range(3):
        losses = [step(IMAGES, TARGETS, n).item() for step in steps]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert list(eager.state_dict()) == list(other.state_dict())
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    copy.deepcopy(eager).load_state_dict(other.state_dict())


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
