"""On a pretended GPU nothing waits or lies on the wrong device, and deterministic mode can run.

Values are compared too, since a GPU takes other forms than the CPU's kernels; it is the CPU that
computes them. What a real GPU computes is compared in ``quantization/test_all_quantizers.py``,
whose tests are skipped, and say so, where there is none.
"""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from pretend_gpu import PretendTensor, gpu, moved, on_cpu
from torch import nn
from training_helpers import IMAGES, TARGETS, network, sgd, trainer_of

from adq_train.quantization.adq import (
    ADAPTATIONS,
    GRANULARITIES,
    INITIALIZATIONS,
    LEVEL_SETS,
    AdqWeightQuantizer,
)
from adq_train.quantization.apot import ApotActivationQuantizer, ApotWeightQuantizer
from adq_train.quantization.dorefa import DorefaActivationQuantizer, DorefaWeightQuantizer
from adq_train.quantization.layers import quantized
from adq_train.quantization.lsq import LsqActivationQuantizer, LsqWeightQuantizer
from adq_train.quantization.n2uq import N2uqActivationQuantizer, N2uqWeightQuantizer
from adq_train.quantization.pact import PactActivationQuantizer
from adq_train.quantization.prepare import Upkeep
from adq_train.training.distillation import Teacher
from adq_train.training.health import FiniteWatch
from adq_train.training.optimizers import make_optimizers

WEIGHTS = [ApotWeightQuantizer, DorefaWeightQuantizer, LsqWeightQuantizer, N2uqWeightQuantizer]
INPUTS = [
    ApotActivationQuantizer, DorefaActivationQuantizer, LsqActivationQuantizer,
    N2uqActivationQuantizer, PactActivationQuantizer,
]  # fmt: skip
# Reads of one calibration, which happens once a layer: finite?, which sign?, any value at all?
CALIBRATION_READS = 10


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


def adq_variants(bits):
    for level_set in LEVEL_SETS:
        for adaptation in ADAPTATIONS:
            for granularity in GRANULARITIES:
                yield AdqWeightQuantizer(
                    bits, level_set=level_set, adaptation=adaptation, granularity=granularity
                )
    for initialization in INITIALIZATIONS:
        yield AdqWeightQuantizer(bits, initialization=initialization)


def used(quantizer, values, following=None):
    """What a quantizer gives: its output, gradients, codes, levels, and state at the end."""
    values = values.detach().requires_grad_()
    output = quantizer(values)
    (output * output).sum().backward()
    if following is not None:
        for _ in range(2):
            quantizer.adapt(following)
    elif hasattr(quantizer, "regularize"):
        quantizer.regularize()
    gradients = [values.grad, *(p.grad for p in quantizer.parameters() if p.grad is not None)]
    with torch.no_grad():
        return [
            output, *gradients, quantizer.quantize(values), quantizer.levels(),
            *quantizer.state_dict().values(),
        ]  # fmt: skip


def check(quantizer, values, following=None):
    """On the pretended GPU: the values of the CPU, and no wait but in calibration."""
    here = copy.deepcopy(quantizer)
    with gpu() as device:
        there = moved(copy.deepcopy(quantizer))
        there.calibrate(moved(values))
        assert sum(device.waits.values()) <= CALIBRATION_READS, (quantizer, device.waits)
        for name, tensor in (*there.named_parameters(), *there.named_buffers()):
            assert isinstance(tensor, PretendTensor), (quantizer, name)
        device.waits.clear()
        found = used(there, moved(values), None if following is None else moved(following))
        assert not device.waits, (quantizer, device.waits)
        found = [on_cpu(x) for x in found]
    here.calibrate(values)
    for got, expected in zip(found, used(here, values, following), strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-5)


def test_weight_quantizers_neither_wait_nor_leave_the_device(deterministic):
    torch.manual_seed(0)
    weight = 0.1 * torch.randn(6, 4, 3, 3)
    following = weight + 0.01 * torch.randn_like(weight)
    few = (make(2) for make in WEIGHTS)
    for quantizer in (*adq_variants(2), AdqWeightQuantizer(8), *few, *(x(8) for x in WEIGHTS)):
        check(quantizer, weight, following)


@pytest.mark.parametrize("bits", [2, 8])
def test_activation_quantizers_neither_wait_nor_leave_the_device(bits, deterministic):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    for make in (*INPUTS, lambda b: N2uqActivationQuantizer(b, initialization="quantile")):
        for values in (x, x.relu()):
            check(make(bits), values)


def wide_network():
    """Layers of 8 and of 3 bits, by every kind of quantizer."""
    torch.manual_seed(0)
    kinds = [
        (AdqWeightQuantizer(8), N2uqActivationQuantizer(8)),
        *((make(3), take(3)) for make, take in zip(WEIGHTS, INPUTS[:4], strict=True)),
        (AdqWeightQuantizer(3, adaptation="centroid"), PactActivationQuantizer(3)),
    ]
    layers = []
    for index, (weights, inputs) in enumerate(kinds):
        layer = nn.Conv2d(3 if index == 0 else 4, 4, 3, padding=1)
        weights.calibrate(layer.weight)
        inputs.calibrate(torch.randn(100) if index == 0 else torch.rand(100))
        layers += [quantized(layer, weights, inputs), nn.BatchNorm2d(4), nn.ReLU()]
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    return nn.Sequential(*layers, nn.MaxPool2d(2), *pooled)


def losses(model, images, targets, *hooks, steps=4, skip=0, **settings):
    trainer = trainer_of(
        model, *hooks, FiniteWatch(skip=skip), optimizer=sgd(model, 0.01), **settings
    )
    found = []
    for _ in range(steps):
        loss = trainer.step(images, targets)
        trainer.sums = trainer.sums.plus(len(images), loss)
        found.append(on_cpu(loss).item())
    return found


OPTIONS = {
    "plain": ({}, 0),
    "all at once": (
        {
            "gradient_clip_norm": 1.0,
            "accumulate_batches": 2,
            "label_smoothing": 0.1,
            "channels_last": True,
        },
        0,
    ),
    "steps may be left out": ({"skip": 1}, 1),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("make", [network, wide_network])
def test_a_training_step_never_waits(name, make, deterministic):
    options, ceiling = OPTIONS[name]
    with gpu() as device:
        model, images, targets = moved(make()), moved(IMAGES), moved(TARGETS)
        found = losses(model, images, targets, **options)
        assert sum(device.waits.values()) <= 4 * ceiling, device.waits
        # The flags of two steps are on their way; those before them have arrived long ago.
        assert device.events == (0 if ceiling else 2)
    assert found == pytest.approx(losses(make(), IMAGES, TARGETS, **options), rel=1e-3)


def launches(model, triton):
    """Of a step with fused optimizers, once their state is there."""
    with gpu(triton) as device:
        model = moved(model)
        fused = [
            partial(torch.optim.SGD, momentum=0.9, fused=True),
            partial(torch.optim.Adam, lr=0.01, fused=True),
        ]
        optimizer = make_optimizers(model, 0.01, 1e-4, *fused)
        trainer = trainer_of(model, FiniteWatch(), optimizer=optimizer)
        for _ in range(2):
            device.launches.clear()
            trainer.step(moved(IMAGES), moved(TARGETS))
        assert not device.waits
        return device.launches


def test_launches_of_a_step_have_a_ceiling():
    """A layer's quantizers, their gradients and its order statistics; following, for all layers."""
    layers = 2
    few = sum(launches(network(quantize=False), triton=True).values())
    found = launches(network(), triton=True)
    assert sum(found.values()) - few <= 37 * layers + 50, found
    names = Counter(name for name, _ in found.elements())
    assert names["staircase"] == 2 * layers  # weight and input
    assert names["sums"] == names["gradients of parameters"] == layers
    assert sum(launches(network(), triton=False).values()) > 2 * sum(found.values())


def test_a_step_with_a_teacher_never_waits(deterministic):
    with gpu() as device:
        teacher = Teacher(moved(network(quantize=False)), temperature=2.0, weight=0.5)
        losses(moved(network()), moved(IMAGES), moved(TARGETS), teacher)
        assert not device.waits


def test_upkeep_never_waits(deterministic):
    with gpu() as device:
        model = moved(wide_network())
        model(moved(torch.rand(2, 3, 6, 6))).sum().backward()
        upkeep = Upkeep(model)
        upkeep.before_step()
        upkeep.after_step()
        assert not device.waits


def test_the_pretended_gpu_sees_what_it_is_for():
    x = torch.tensor([1.0, -2.0, 3.0])
    index = torch.tensor(1)

    def mask(y):
        return y[y > 0]

    reads = [
        mask,
        float,
        lambda y: bool(y.sum() > 0),
        lambda y: y[moved(index)],
        lambda y: y.cpu(),
        lambda y: y.copy_(x),
        lambda y: torch.zeros(3, device=y.device).copy_(x),
        lambda y: torch.bincount((y > 0).long()),
        lambda y: torch.equal(y, y),
    ]
    for read in reads:
        with gpu() as device:
            y = moved(x[:1] if read is float else x)
            read(y)
            assert device.waits, read
    with gpu() as device:
        y = moved(x)
        assert y.is_cuda
        assert (y * 2 + torch.arange(3, device=y.device)).device.type == "cuda"
        y.to("cpu", non_blocking=True)
        torch.where(y > 0, y, 1.0)[moved(torch.tensor([0, 1]))].sum()
        assert not device.waits
        with pytest.raises(AssertionError, match="a CPU tensor among"):
            y + x
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(AssertionError, match="not deterministic"):
                torch.bincount((y > 0).long(), weights=y)
            image = moved(torch.rand(1, 1, 4, 4)).requires_grad_()
            with pytest.raises(AssertionError, match="not deterministic"):
                nn.AdaptiveAvgPool2d(2)(image).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
