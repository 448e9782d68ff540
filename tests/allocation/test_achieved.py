from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adq_train
from adq_train.allocation.achieved import achieved, require_achieved
from adq_train.allocation.allocator import allocate
from adq_train.allocation.budget import Budget, Problem
from adq_train.allocation.fixed import FixedAllocator
from adq_train.artifacts import LayerSensitivity, SensitivityTable
from adq_train.errors import UserError
from adq_train.quantization.adq import AdqWeightQuantizer
from adq_train.quantization.describe import describe_layers
from adq_train.quantization.n2uq import N2uqActivationQuantizer
from adq_train.quantization.prepare import collect_inputs, prepare, quantized_layers


class Network(nn.Module):
    """A layer that runs twice, one that is grouped, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.alias = self.shared
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.alias(self.shared(self.stem(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def prepared():
    torch.manual_seed(0)
    model, image = Network(), torch.rand(1, 1, 5, 5)
    layers = describe_layers(model, image)
    problem = Problem(layers, {"stem": 8}, (2, 3, 4), Budget(average_weight_bits=4), tied=False)
    table = SensitivityTable(
        "m", (), tuple(LayerSensitivity(x.name, x.num_weights, x.macs, {}) for x in layers)
    )
    bits = FixedAllocator({"shared": [3, 2], "head": [4, 5]})
    allocation = allocate(bits, problem, table)
    names = [x.name for x in layers]
    inputs = collect_inputs(model, names, [torch.rand(4, 1, 5, 5)], seed=0)
    prepare(model, allocation, AdqWeightQuantizer, N2uqActivationQuantizer, inputs, seed=0)
    return model, image, problem, allocation


def test_the_prepared_model_costs_exactly_what_was_promised(prepared):
    model, image, problem, allocation = prepared
    counted = achieved(model, image, problem.pinned)
    require_achieved(allocation, counted)
    # By hand: 36, 72 and 12 weights; 25 x 9 x 4, twice 25 x 18 x 4 and 12 MACs.
    assert asdict(counted) == {
        "average_weight_bits": (72 * 3 + 12 * 4) / 84,
        "average_weight_bits_all_layers": (36 * 8 + 72 * 3 + 12 * 4) / 120,
        "average_activation_bits": (200 * 2 + 4 * 5) / 204,
        "model_size_bytes": 36 + 27 + 6,
        "bops": 900 * 64 + 3600 * 6 + 12 * 20,
    }


def test_a_model_with_other_bits_is_refused(prepared):
    model, image, problem, allocation = prepared
    quantized_layers(model)["head"].weight_quantizer = AdqWeightQuantizer(2)
    counted = achieved(model, image, problem.pinned)
    with pytest.raises(UserError, match=r"model_size_bytes 69 but the model has 66;"):
        require_achieved(allocation, counted)


def test_an_edited_file_is_refused(prepared):
    model, image, problem, allocation = prepared
    with pytest.raises(UserError, match=r"says bops 1 but the model has"):
        require_achieved(replace(allocation, bops=1), achieved(model, image, problem.pinned))


def test_a_quantizer_with_too_many_levels_is_refused(prepared):
    model, image, problem, _ = prepared
    quantized_layers(model)["shared"].weight_quantizer.bit_width = 2
    with pytest.raises(UserError, match="shared: the quantizer of its weights has 8 levels"):
        achieved(model, image, problem.pinned)


def test_a_layer_that_is_not_computed_in_evaluation_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.fused = nn.Linear(8, 8), nn.Linear(8, 3), False

        def forward(self, x):
            if self.fused and not self.training:  # as a fast path of a library would
                return self.head(F.linear(x, self.body.weight, self.body.bias))
            return self.head(self.body(x))

    model, x = Net(), torch.randn(4, 8)
    quantized = adq_train.quantize(model, [x], average_bits=3, first_last_bits=None)
    achieved(quantized, x, {})
    quantized.fused = True
    with pytest.raises(UserError, match=r"layer body is not computed in evaluation"):
        achieved(quantized, x, {})
